//! What `hadal launch` writes: a batch file that Slurm's commands are asked by as they should be, here with commands that only note
//! what they are asked, and a manifest that is YAML. `tests/cluster/slurm.sh` is the same file on a real Slurm.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn hadal(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
    let output = command.args(args).current_dir(ROOT).env_remove("HADAL_MPI").output().expect("the program starts");
    parts(&output)
}

fn parts(Output { status, stdout, stderr }: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

/// What is printed for these arguments, which must be right.
fn launched(args: &[&str]) -> String {
    let (code, stdout, stderr) = hadal(&[&["launch"], args].concat());
    assert_eq!(code, 0, "{args:?}\n{stderr}");
    stdout
}

/// Slurm's commands, of which each start ends as it was said, in a folder.
struct Cluster {
    folder: TempDir,
    script: PathBuf,
}

/// Answers for the nodes that are not `gone`, notes how the run is started, and ends as the next line of `starts` says: with a code, and
/// a newer checkpoint or none.
const SRUN: &str = r#"#!/bin/bash
if [[ $* == *--overlap* ]]; then [[ $* != *"--nodelist=$(cat gone 2>/dev/null) "* ]]; exit; fi
printf '%s\0' "$@" >>srun
read -r code checkpoint <starts
sed -i 1d starts
[[ -z $checkpoint ]] || { mkdir -p run && ln -sfn "$checkpoint" run/latest; }
exit "$code"
"#;
const SCONTROL: &str = r#"#!/bin/bash
if [[ $1 == show ]]; then printf 'n%s\n' 1 2 3; else echo "$*" >>scontrol; fi
"#;

impl Cluster {
    fn new(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let cluster = Cluster { script: folder.path().join("job"), folder };
        for (name, text) in [("srun", SRUN), ("scontrol", SCONTROL)] {
            let path = cluster.file(&format!("bin/{name}"));
            fs::create_dir_all(cluster.file("bin")).expect("a folder");
            fs::write(&path, text).expect("a file");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a program");
        }
        symlink(Path::new(ROOT).join("scenes"), cluster.file("scenes")).expect("a link");
        let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
        command.args(["launch", "slurm", "scenes/cluster.ron", "--set=telemetry.dir=\".\"", "--set=name=\"run\""]);
        let output = command.args(args).args(["--out", "job"]).current_dir(cluster.folder.path()).output();
        let (code, stdout, stderr) = parts(&output.expect("the program starts"));
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(fs::read_to_string(&cluster.script).expect("the file"), stdout, "what is written is shown");
        assert!(stderr.contains("try: sbatch job"), "{stderr}");
        cluster
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_default()
    }

    /// One life of the job: its exit code, and whether it asked to be requeued.
    fn run(&self, starts: &str) -> (i32, bool) {
        fs::write(self.file("starts"), starts).expect("a file");
        let _ = fs::remove_file(self.file("scontrol"));
        let path = format!("{}:{}", self.file("bin").display(), env::var("PATH").expect("a PATH"));
        let mut command = Command::new("bash");
        command.arg(&self.script).env("PATH", path).env("SLURM_JOB_ID", "7").env("SLURM_JOB_NODELIST", "n[1-3]");
        let (code, stdout, stderr) = parts(&command.current_dir("/").output().expect("bash starts"));
        assert_eq!(stderr, "", "{stdout}");
        assert_eq!(self.read("starts"), "", "all starts are used: {stdout}");
        let asked = self.read("scontrol");
        assert!(asked.is_empty() || asked == "requeue 7\n", "{asked}");
        (code, !asked.is_empty())
    }

    /// The words of every call of srun, one after the other.
    fn words(&self) -> Vec<String> {
        self.read("srun").split_terminator('\0').map(str::to_owned).collect()
    }
}

#[test]
fn the_batch_file_asks_for_what_the_scene_needs() {
    let text = launched(&["slurm", "scenes/cluster.ron"]);
    for line in [
        "#SBATCH --job-name=cluster",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR1@120",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is in\n{text}");
    }
    assert!(!text.contains("--time") && !text.contains("gpu") && !text.contains("#SBATCH --no-kill"), "{text}");
    let options =
        ["--nodes=4", "--partition=gpu", "--account=a", "--time=1-00", "--signal-secs=300", "--spare-nodes=1"];
    let sets = ["--set=device=Cuda(0)", "--set=name=\"two words\"", "--cores-per-rank=6"];
    let text = launched(&[&["slurm", "scenes/cluster.ron"][..], &options, &sets].concat());
    for line in [
        "#SBATCH --job-name=two-words",
        "#SBATCH --nodes=5",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=a",
        "#SBATCH --time=1-00",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --no-kill",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is in\n{text}");
    }
    assert!(text.contains("'--set=device=Cuda(0)'") && text.contains("--set=mesh.ranks_per_node=1"), "{text}");
}

#[test]
fn what_cannot_be_launched_is_refused() {
    let cases: [(&[&str], &str); 5] = [
        (&["--nodes", "3"], "--nodes is 3, which does not divide the 4 ranks"),
        (&["--ranks-per-node", "3"], "--ranks-per-node is 3"),
        (&["--set", "mesh.ranks_per_node=3"], "mesh.ranks_per_node is 3"),
        (&["--partition", "a b"], "expected letters"),
        (&["--time", "2:00"], "--time 2:00 is no longer than the 120 s"),
    ];
    for (args, says) in cases {
        let (code, stdout, stderr) = hadal(&[&["launch", "slurm", "scenes/cluster.ron"], args].concat());
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}");
        assert!(stderr.contains(says), "{stderr}");
    }
    for (image, mount, says) in [("", "/hadal", "expected an image"), ("a:1", "hadal", "expected a path from / on")] {
        let args = ["launch", "k8s", "scenes/cluster.ron", "--claim=a", "--image", image, "--mount", mount];
        let (code, _, stderr) = hadal(&args);
        assert!(code == 2 && stderr.contains(says), "{stderr}");
    }
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("mine");
    fs::write(&file, "mine").expect("a file");
    let (code, _, stderr) = hadal(&["launch", "slurm", "scenes/cluster.ron", "--out", file.to_str().expect("UTF-8")]);
    assert_eq!(code, 2);
    assert!(stderr.contains("is there already"), "{stderr}");
    assert_eq!(fs::read_to_string(file).expect("the file"), "mine");
    let (_, _, stderr) = hadal(&["launch", "slurm", "scenes/cluster.ron", "--set", "checkpoint=None"]);
    assert!(stderr.contains("it begins anew"), "{stderr}");
}

#[test]
fn srun_gets_the_words_as_they_were_given() {
    let odd = "--set=sample.prompt=\"it's $(touch /tmp/x) `y` \\\\ \"";
    let cluster = Cluster::new(&[odd]);
    assert_eq!(cluster.run("0"), (0, false));
    let words = cluster.words();
    let at = words.iter().position(|word| word.ends_with("hadal")).expect("the program");
    assert_eq!(words[at], env!("CARGO_BIN_EXE_hadal"));
    let rest = ["run", "scenes/cluster.ron", "--set=telemetry.dir=\".\"", "--set=name=\"run\"", odd, "--resume"];
    assert_eq!(words[at + 1..], rest);
    for word in ["--mpi=pmi2", "--kill-on-bad-exit=1", "--distribution=block", "--nodes=2", "--ntasks=4"] {
        assert!(words[..at].iter().any(|found| found == word), "{word} is in {words:?}");
    }
}

#[test]
fn exit_codes_decide_over_another_start() {
    for code in [0, 1, 2, 3, 4, 6, 130] {
        assert_eq!(Cluster::new(&[]).run(&format!("{code} step-1")), (code, false));
    }
    for code in [5, 137, 139, 143] {
        assert_eq!(Cluster::new(&[]).run(&format!("{code} step-1")), (code, true));
    }
    // Twice in a row may lead nowhere, the third time ends it.
    let cluster = Cluster::new(&[]);
    for (starts, ends) in [
        ("5", (5, true)),
        ("137", (137, true)),
        ("5 step-1", (5, true)),
        ("143", (143, true)),
        ("5", (5, true)),
        ("5", (5, false)),
    ] {
        assert_eq!(cluster.run(starts), ends, "{starts}");
    }
}

#[test]
fn a_spare_node_takes_the_place_of_one_that_does_not_answer() {
    let cluster = Cluster::new(&["--spare-nodes", "1"]);
    assert_eq!(cluster.run("0"), (0, false));
    fs::write(cluster.file("gone"), "n2").expect("a file");
    assert_eq!(cluster.run("5\n139 step-1\n0"), (0, false));
    let nodes: Vec<String> = cluster.words().into_iter().filter(|word| word.starts_with("--nodelist")).collect();
    assert_eq!(nodes, ["--nodelist=n1,n2", "--nodelist=n1,n3", "--nodelist=n1,n3", "--nodelist=n1,n3"]);
    // A signal is about all nodes, and two nodes are too few to lose.
    assert_eq!(cluster.run("143 step-2"), (143, true));
    assert_eq!(Cluster::new(&["--spare-nodes", "1"]).run("5\n5\n5"), (5, false));
    let cluster = Cluster::new(&["--nodes=4", "--spare-nodes=1"]);
    assert_eq!(cluster.run(""), (5, true), "three nodes answer, and four are needed");
}

#[test]
fn the_manifest_is_yaml_with_the_words_as_they_were_given() {
    let odd = "--set=sample.prompt=\"it's: a #b & <c>\"";
    let read = |args: &[&str]| {
        let start = ["k8s", "scenes/cluster.ron", "--image", "here/hadal:1", "--claim", "runs", odd];
        let text = launched(&[&start, args].concat());
        let script = "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1])), sys.stdout)";
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("job.yaml");
        fs::write(&file, &text).expect("a file");
        let output = Command::new("python3").args(["-c", script]).arg(&file).output();
        let Ok(output) = output.map_err(|e| e.to_string()).and_then(|output| match output.status.success() {
            true => Ok(output),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }) else {
            eprintln!("!! SKIPPED: python3 has no module yaml; the manifest is not parsed");
            return None;
        };
        Some(serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON"))
    };
    let Some(job) = read(&[]) else { return };
    assert_eq!((&job["apiVersion"], &job["kind"]), (&"kubeflow.org/v2beta1".into(), &"MPIJob".into()));
    let spec = &job["spec"];
    assert_eq!((&spec["mpiImplementation"], &spec["slotsPerWorker"]), (&"MPICH".into(), &2.into()));
    let replicas = &spec["mpiReplicaSpecs"];
    assert_eq!((&replicas["Launcher"]["replicas"], &replicas["Worker"]["replicas"]), (&1.into(), &2.into()));
    let launcher = &replicas["Launcher"]["template"]["spec"]["containers"][0];
    let words = ["mpiexec", "-n", "4", "-ppn", "2", "hadal", "run", "scenes/cluster.ron", odd, "--resume"];
    assert_eq!(launcher["command"], serde_json::json!(words));
    assert!(replicas["Worker"]["template"]["spec"]["containers"][0]["resources"].is_null());
    let Some(job) = read(&["--mpi=openmpi", "--set=device=Cuda(0)", "--cores-per-rank=4", "--ranks-per-node=4"]) else {
        return;
    };
    let replicas = &job["spec"]["mpiReplicaSpecs"];
    let limits = &replicas["Worker"]["template"]["spec"]["containers"][0]["resources"]["limits"];
    assert_eq!((&limits["nvidia.com/gpu"], &limits["cpu"]), (&4.into(), &16.into()));
    assert_eq!(replicas["Worker"]["replicas"], 1);
}
