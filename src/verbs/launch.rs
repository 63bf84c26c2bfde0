//! `hadal launch`: the file that a cluster's launcher takes, from a scene: shown before it is used, and written where it is asked for.
//!
//! The files are templates beside this one; what goes into a shell is quoted for it, what goes into YAML is JSON, which YAML
//! reads. What a restart mends and what it does not is decided there, by the exit codes of `hadal run`.

use std::{
    env,
    fs::File,
    io::{ErrorKind, Write},
    path::Path,
    process::ExitCode,
};

use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value, context, syntax::SyntaxConfig};
use systems::scene::{Device, Scene};

use crate::{
    cli::{K8sArgs, LaunchArgs, Launcher, Mpi, Placed, SlurmArgs, slurm_secs},
    failure::Failure,
    load, report,
};

const SLURM: &str = include_str!("launch/slurm.sbatch.jinja");
const MPI_JOB: &str = include_str!("launch/mpijob.yaml.jinja");

/// Writes the file, and says what to do with it.
///
/// # Errors
/// If the scene is not valid, its ranks do not come to whole nodes, or the file cannot be written.
pub fn launch(args: &LaunchArgs) -> Result<ExitCode, Failure> {
    let (placed, text, begin) = match &args.launcher {
        Launcher::Slurm(args) => (&args.placed, slurm(args)?, "sbatch"),
        Launcher::K8s(args) => (&args.placed, mpi_job(args)?, "kubectl apply -f"),
    };
    if let Some(path) = &placed.out {
        write_new(path, &text)?;
    }
    report::to_stdout(&text)?;
    match &placed.out {
        Some(path) => eprintln!("try: {begin} {}", quoted(&path.display().to_string())?),
        None => eprintln!("try: the same with --out FILE, then {begin} FILE"),
    }
    Ok(ExitCode::SUCCESS)
}

fn slurm(args: &SlurmArgs) -> Result<String, Failure> {
    let scene = load_scene(&args.placed)?;
    if let Some(time) = args.time.as_deref().filter(|time| slurm_secs(time) <= u64::from(args.signal_secs)) {
        return Err(Failure::usage(
            format!(
                "--time {time} is no longer than the {} s before its end at which ranks are told to save",
                args.signal_secs
            ),
            "a longer --time, or a smaller --signal-secs",
        ));
    }
    let nodes = Nodes::of(&args.placed, &scene)?;
    let folder = env::current_dir().map_err(|e| Failure::runtime(format!("cannot name this folder: {e}")))?;
    let program = env::current_exe().map_err(|e| Failure::runtime(format!("cannot name this program: {e}")))?;
    let run_dir = load::run_dir(&scene);
    let mut command = vec![quoted(&program.display().to_string())?];
    for word in run_words(&args.placed, &scene, &nodes) {
        command.push(quoted(&word)?);
    }
    render(
        SLURM,
        context! {
            nodes,
            made_from => plain(&args.placed.scene.display().to_string(), '?'),
            name => plain(&scene.name, '-'),
            folder => quoted(&folder.display().to_string())?,
            run_dir => quoted(&run_dir.display().to_string())?,
            library => env::var("HADAL_MPI").ok().map(|path| quoted(&path)).transpose()?,
            command => command.join(" "),
            partition => args.partition.as_deref(),
            account => args.account.as_deref(),
            time => args.time.as_deref(),
            signal_secs => args.signal_secs,
            spare_nodes => args.spare_nodes,
        },
    )
}

fn mpi_job(args: &K8sArgs) -> Result<String, Failure> {
    let scene = load_scene(&args.placed)?;
    let nodes = Nodes::of(&args.placed, &scene)?;
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let (all, each) = (nodes.num_ranks.to_string(), nodes.ranks_per_node.to_string());
    let mut command = match args.mpi {
        Mpi::Mpich => words(&["mpiexec", "-n", &all, "-ppn", &each]),
        Mpi::Openmpi => {
            let by_node = format!("ppr:{each}:node");
            words(&["mpirun", "--allow-run-as-root", "-n", &all, "--map-by", &by_node])
        }
    };
    command.push("hadal".into());
    command.extend(run_words(&args.placed, &scene, &nodes));
    let name = match &args.name {
        Some(name) => name.clone(),
        None => label(&scene.name),
    };
    render(
        MPI_JOB,
        context! {
            nodes,
            made_from => plain(&args.placed.scene.display().to_string(), '?'),
            name,
            implementation => if args.mpi == Mpi::Mpich { "MPICH" } else { "OpenMPI" },
            command,
            image => args.image.as_str(),
            claim => args.claim.as_str(),
            mount => args.mount.as_str(),
        },
    )
}

fn load_scene(placed: &Placed) -> Result<Scene, Failure> {
    let scene = load::scene(&placed.scene, &placed.overrides.set, &["model", "data", "train"])?.loaded.scene;
    if scene.checkpoint.is_none() {
        eprintln!("the scene has no section `checkpoint`: whatever interrupts the run, it begins anew");
    }
    Ok(scene)
}

/// The run, without the program: to go on from what is there, with the layout that is launched.
fn run_words(placed: &Placed, scene: &Scene, nodes: &Nodes) -> Vec<String> {
    let mut words = vec!["run".to_owned(), placed.scene.display().to_string()];
    words.extend(placed.overrides.set.iter().map(|set| format!("--set={set}")));
    // Which ranks share a node decides over the links that rows to experts take.
    if nodes.num_nodes > 1 && nodes.ranks_per_node != scene.mesh.ranks_per_node {
        words.push(format!("--set=mesh.ranks_per_node={}", nodes.ranks_per_node));
    }
    words.push("--resume".into());
    words
}

/// How ranks lie on nodes.
#[derive(Debug)]
struct Nodes {
    num_ranks: u32,
    num_nodes: u32,
    ranks_per_node: u32,
    cores_per_rank: Option<u32>,
    has_gpus: bool,
}

impl Nodes {
    fn of(placed: &Placed, scene: &Scene) -> Result<Self, Failure> {
        let num_ranks = scene.num_ranks();
        let has_gpus = scene.device != Device::Cpu;
        let cores_per_rank = placed.cores_per_rank;
        let ranks_per_node = match (placed.nodes, placed.ranks_per_node) {
            (Some(nodes), _) if num_ranks.is_multiple_of(nodes) => num_ranks / nodes,
            (Some(nodes), _) => return Err(uneven(num_ranks, "--nodes", nodes)),
            (None, Some(each)) => each,
            (None, None) => scene.mesh.ranks_per_node.min(num_ranks),
        };
        if !num_ranks.is_multiple_of(ranks_per_node) {
            let named = if placed.ranks_per_node.is_some() { "--ranks-per-node" } else { "mesh.ranks_per_node" };
            return Err(uneven(num_ranks, named, ranks_per_node));
        }
        Ok(Nodes { num_ranks, num_nodes: num_ranks / ranks_per_node, ranks_per_node, cores_per_rank, has_gpus })
    }
}

impl From<Nodes> for Value {
    fn from(nodes: Nodes) -> Self {
        let Nodes { num_ranks, num_nodes, ranks_per_node, cores_per_rank, has_gpus } = nodes;
        context! { num_ranks, num_nodes, ranks_per_node, cores_per_rank, has_gpus }
    }
}

fn uneven(num_ranks: u32, named: &str, number: u32) -> Failure {
    let fits: Vec<String> = (1..=num_ranks).filter(|n| num_ranks.is_multiple_of(*n)).map(|n| n.to_string()).collect();
    Failure::usage(
        format!("{named} is {number}, which does not divide the {num_ranks} ranks of the scene"),
        format!("one of {} does", fits.join(", ")),
    )
}

fn render(template: &str, context: Value) -> Result<String, Failure> {
    let made = || -> Result<String, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build()?;
        environment.set_syntax(syntax);
        environment.render_str(template, context)
    };
    made().map_err(|e| Failure::runtime(format!("cannot make the file: {e:#}")))
}

/// As one word of a shell.
fn quoted(text: &str) -> Result<String, Failure> {
    let quoted = shlex::try_quote(text).map_err(|e| Failure::runtime(format!("cannot quote {text:?}: {e}")))?;
    Ok(quoted.into_owned())
}

/// With `instead` for what is not plain everywhere: in comments, names of jobs and of files.
fn plain(text: &str, instead: char) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || "_-./".contains(c) { c } else { instead }).collect()
}

/// As the name of an object of Kubernetes.
fn label(text: &str) -> String {
    let dashed = text.to_ascii_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    let cut: String = dashed.trim_start_matches(|c: char| !c.is_ascii_lowercase()).chars().take(54).collect();
    let cut = cut.trim_end_matches('-');
    if cut.is_empty() { "hadal".into() } else { cut.to_owned() }
}

fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let shown = path.display();
    match File::create_new(path).and_then(|mut file| file.write_all(text.as_bytes())) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            Err(Failure::usage(format!("{shown} is there already"), "remove it, or name another file with --out"))
        }
        written => written.map_err(|e| Failure::runtime(format!("cannot write {shown}: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_to_fit() {
        for (name, want) in [("two_by_two", "two-by-two"), ("7 Ünder", "nder"), ("__", "hadal"), ("A.", "a")] {
            assert_eq!(label(name), want);
        }
        assert_eq!(plain("a b/ü\n#SBATCH", '-'), "a-b/---SBATCH");
    }
}
