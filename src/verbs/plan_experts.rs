//! `hadal plan --experts`: which rank should hold which experts, for a measured load.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, ValueEnum};
use serde::Serialize;
use systems::placement::{
    self, Placement, PlacementError, Sizes,
    incremental::{self, Plan},
    load,
    policy::{self, LOCALITY_WORTH},
    report::{LayerReport, Report},
};

use crate::{
    failure::Failure,
    report::{Output, Table},
    units,
};

/// Arguments of `plan --experts`. Where they stand beside those of another request, `experts` says which is meant; the
/// others need it.
#[derive(Debug, Args)]
pub struct ExpertsArgs {
    /// Place experts for the loads in FILE: a run's log.jsonl or its folder, or JSON `{"layers": [[..], ..]}` with
    /// counts or shares of each layer's experts
    #[arg(long, value_name = "FILE")]
    pub experts: Option<PathBuf>,
    /// Steps of a log to add up, as FIRST..LAST; without it the last 50
    #[arg(long, value_name = "RANGE", value_parser = steps, requires = "experts")]
    pub load_steps: Option<(u64, u64)>,
    /// Ranks that hold experts
    #[arg(long, value_name = "N", default_value_t = 32, requires = "experts")]
    pub ranks: usize,
    /// Nodes that the ranks are on
    #[arg(long, value_name = "N", default_value_t = 4, requires = "experts")]
    pub nodes: usize,
    /// Slots of a layer over all ranks; without it one for each expert and one more on each rank
    #[arg(long, value_name = "N", requires = "experts")]
    pub replicas: Option<usize>,
    /// Groups of experts that routing chooses among first
    #[arg(long, value_name = "N", default_value_t = 8, requires = "experts")]
    pub groups: usize,
    /// How to place
    #[arg(long, value_name = "POLICY", default_value = "best", requires = "experts")]
    pub policy: Policy,
    /// What --json wrote before: move experts from there instead of placing all anew
    #[arg(long, value_name = "FILE", requires = "experts")]
    pub current: Option<PathBuf>,
    /// Experts to move at most, of all layers; as many as are worth it without it
    #[arg(long, value_name = "N", requires_all = ["experts", "current"])]
    pub max_moves: Option<usize>,
    /// Bytes of one expert's weights, with a unit, to say what the moves carry
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes, requires = "experts")]
    pub expert_bytes: Option<u64>,
}

/// How to place experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// As published, each group of experts on one node
    Hierarchical,
    /// As published, without regard to groups and nodes
    Global,
    /// Groups on nodes where that is hardly less even, no expert twice on a rank, improved by swaps
    Best,
}

impl From<Policy> for policy::Policy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Hierarchical => policy::Policy::Hierarchical,
            Policy::Global => policy::Policy::Global,
            Policy::Best => policy::Policy::Best,
        }
    }
}

fn steps(text: &str) -> Result<(u64, u64), String> {
    let (first, last) = text.split_once("..").ok_or("expected FIRST..LAST")?;
    let step = |text: &str| text.parse::<u64>().map_err(|_| format!("expected the number of a step, found `{text}`"));
    let (first, last) = (step(first)?, step(last)?);
    if first <= last { Ok((first, last)) } else { Err(format!("{first} comes after {last}")) }
}

const LOADS_HELP: &str = "a run's log or folder, or JSON with `layers`: counts or shares of each layer's experts";

/// A placement, and how even it is.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    sizes: Sizes,
    policy: Policy,
    max_over_mean: f64,
    worst_max_over_mean: f64,
    max_over_mean_contiguous: f64,
    /// Of `--current`, under the load given.
    max_over_mean_before: Option<f64>,
    /// Of the policy, if all were placed anew, where `--current` is improved instead.
    max_over_mean_anew: Option<f64>,
    num_moves_anew: Option<usize>,
    num_moves: Option<usize>,
    moved_bytes: Option<u64>,
    num_duplicates: usize,
    num_split_groups: usize,
    layers: Vec<LayerDocument<'a>>,
    moves: &'a [incremental::Move],
}

#[derive(Serialize)]
struct LayerDocument<'a> {
    /// The model's number of the layer.
    layer: usize,
    physical_to_expert: &'a [usize],
    num_replicas_of: &'a [usize],
    #[serde(flatten)]
    report: &'a LayerReport,
}

/// Places.
///
/// # Errors
/// If a file cannot be read or has something else, or sizes do not fit.
pub fn run(args: &ExpertsArgs, output: &Output) -> Result<ExitCode, Failure> {
    // The parser sees to this, or whoever calls.
    let missing = || Failure::usage("no loads to place experts for", "give --experts");
    let experts = args.experts.as_deref().ok_or_else(missing)?;
    let measured = load::read(experts, args.load_steps).map_err(|error| Failure::usage(error, LOADS_HELP))?;
    let num_experts = measured.shares.first().map_or(0, Vec::len);
    let sizes = sizes(args, num_experts);
    let anew = policy::place(&measured.shares, sizes, args.policy.into()).map_err(refused)?;
    let current = args.current.as_deref().map(|path| read_placement(path, num_experts, args.ranks)).transpose()?;
    let (placement, plans) = match &current {
        None => (anew, None),
        Some(current) => {
            let plan = incremental::improve(current, &measured.shares, args.max_moves.unwrap_or(usize::MAX));
            let full = incremental::migrate(current, &anew).map_err(refused)?;
            let plan = plan.map_err(refused)?;
            (plan.placement.clone(), Some((plan, full)))
        }
    };
    let report = placement::report::report(&placement, &measured.shares, sizes, current.as_ref()).map_err(refused)?;
    let (plan, full) = plans.unzip();
    let anew = full.map(|full: Plan| {
        let layers = (0..full.placement.num_layers()).map(|i| full.placement.rank_imbalance(i, &measured.shares[i]));
        (placement::report::over_layers(&measured.shares, layers), full.num_moved)
    });
    let document = Document {
        sizes,
        policy: args.policy,
        max_over_mean: report.max_over_mean,
        worst_max_over_mean: report.worst_max_over_mean,
        max_over_mean_contiguous: report.max_over_mean_contiguous,
        max_over_mean_before: report.max_over_mean_before,
        max_over_mean_anew: anew.map(|anew| anew.0),
        num_moves_anew: anew.map(|anew| anew.1),
        num_moves: report.num_moves,
        moved_bytes: plan.as_ref().zip(args.expert_bytes).map(|(plan, bytes)| plan.num_bytes(bytes)),
        num_duplicates: report.num_duplicates,
        num_split_groups: report.num_split_groups,
        layers: layers(&measured.layers, &placement, &report),
        moves: plan.as_ref().map_or(&[], |plan| plan.moves.as_slice()),
    };
    let title = format!("experts of {}", experts.display());
    output.result(&document, &format!("{}{}", table(&document).render(&title), layer_table(&document)))?;
    Ok(ExitCode::SUCCESS)
}

fn sizes(args: &ExpertsArgs, num_experts: usize) -> Sizes {
    let one_more = || num_experts.next_multiple_of(args.ranks.max(1)) + args.ranks;
    Sizes {
        num_replicas: args.replicas.unwrap_or_else(one_more),
        num_groups: args.groups,
        num_nodes: args.nodes,
        num_ranks: args.ranks,
    }
}

/// Sizes are arguments: all findings, a line each.
fn refused(error: PlacementError) -> Failure {
    Failure::usage(error, "see --ranks, --nodes, --replicas, --groups and --current")
}

/// Reads `layers[].physical_to_expert` of what `--json` wrote.
fn read_placement(path: &Path, num_experts: usize, num_ranks: usize) -> Result<Placement, Failure> {
    #[derive(serde::Deserialize)]
    struct Layer {
        physical_to_expert: Vec<usize>,
    }
    #[derive(serde::Deserialize)]
    struct Written {
        layers: Vec<Layer>,
    }
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::runtime(format!("cannot read {}: {error}", path.display())))?;
    let written: Written = serde_json::from_str(&text).map_err(|error| {
        let expected = "expected `layers` with `physical_to_expert` each, as --json writes";
        Failure::runtime(format!("{}:{}: {expected}, found {error}", path.display(), error.line()))
    })?;
    let slots = written.layers.into_iter().map(|layer| layer.physical_to_expert).collect();
    Placement::new(slots, num_experts, num_ranks)
        .map_err(|error| Failure::usage(format!("{}: {error}", path.display()), "--ranks as when it was written"))
}

fn layers<'a>(numbers: &[usize], placement: &'a Placement, report: &'a Report) -> Vec<LayerDocument<'a>> {
    let layer = |(i, report): (usize, &'a LayerReport)| LayerDocument {
        layer: numbers[i],
        physical_to_expert: placement.physical_to_expert[i].as_slice(),
        num_replicas_of: placement.num_replicas_of[i].as_slice(),
        report,
    };
    report.layers.iter().enumerate().map(layer).collect()
}

fn table(document: &Document) -> Table {
    let mut table = Table::default();
    let Sizes { num_replicas, num_groups, num_nodes, num_ranks } = document.sizes;
    let num_experts = document.layers.first().map_or(0, |layer| layer.num_replicas_of.len());
    let extra = num_replicas.saturating_sub(num_experts);
    let split = match document.num_split_groups {
        0 => "each on one node".into(),
        split if document.policy == Policy::Best && document.num_moves.is_none() => {
            format!("{split} on several nodes, where that lowers max/mean by more than {LOCALITY_WORTH}")
        }
        split => format!("{split} on several nodes"),
    };
    table
        .row("layers", format!("{} with {num_experts} experts in {num_groups} groups", document.layers.len()))
        .row(
            "slots",
            format!("{num_replicas} a layer, {extra} of them for replicas, on {num_ranks} ranks of {num_nodes} nodes"),
        )
        .row("max/mean", format!("{:.3}, worst layer {:.3}", document.max_over_mean, document.worst_max_over_mean))
        .row("in order", format!("{:.3}, without replicas", document.max_over_mean_contiguous))
        .maybe("before", document.max_over_mean_before.map(|before| format!("{before:.3}")))
        .maybe("moves", document.num_moves.map(|moves| moved(moves, document.moved_bytes)))
        .maybe(
            "all anew",
            document
                .max_over_mean_anew
                .zip(document.num_moves_anew)
                .map(|(ratio, moves)| format!("{ratio:.3}, with {} moves", units::grouped(moves as u64))),
        )
        .row("duplicates", format!("{} slots whose expert is on the rank already", document.num_duplicates))
        .row("groups", format!("{} in all layers, {split}", num_groups * document.layers.len()));
    table
}

fn moved(num_moves: usize, bytes: Option<u64>) -> String {
    let bytes = bytes.map_or_else(String::new, |bytes| format!(", {}", units::bytes(bytes)));
    format!("{} of an expert{bytes}", units::grouped(num_moves as u64))
}

/// A line for each layer. With what it compares depends on whether there is a placement before.
fn layer_table(document: &Document) -> String {
    let before = if document.num_moves.is_some() { "before" } else { "in order" };
    let mut text = format!(
        "\n  {:>5}  {before:>8}  {:>8}  {:>7}  {:>8}  {:>5}\n",
        "layer", "max/mean", "hottest", "replicas", "moves"
    );
    for LayerDocument { layer, report, .. } in &document.layers {
        let before = report.max_over_mean_before.unwrap_or(report.max_over_mean_contiguous);
        let moves = report.num_moves.map_or_else(|| "-".into(), |moves| moves.to_string());
        let (now, hottest, replicas) = (report.max_over_mean, report.hottest_expert, report.hottest_num_replicas);
        text += &format!("  {layer:>5}  {before:>8.3}  {now:>8.3}  {hottest:>7}  {replicas:>8}  {moves:>5}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use clap::Parser;
    use serde_json::Value;

    use super::*;

    /// As a verb has it that does other things too.
    #[derive(Debug, Parser)]
    struct Plan {
        #[command(flatten)]
        experts: ExpertsArgs,
    }

    fn parse(line: &str) -> Result<ExpertsArgs, clap::Error> {
        Plan::try_parse_from(line.split(' ')).map(|plan| plan.experts)
    }

    /// What the verb writes with `arguments`, or the message of its failure.
    fn plan(dir: &Path, arguments: &str) -> Result<Value, String> {
        let args = parse(&format!("plan --experts {}/loads.json {arguments}", dir.display())).unwrap();
        let json = dir.join("placement.json");
        let message = |failure: Failure| failure.document()["errors"][0]["message"].as_str().unwrap().to_owned();
        run(&args, &Output::open(Some(&json)).map_err(message)?).map_err(message)?;
        Ok(serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap())
    }

    #[test]
    fn what_parses_and_what_does_not() {
        assert!(parse("plan").unwrap().experts.is_none(), "defaults alone do not ask for a placement");
        let args = parse("plan --experts a --load-steps 3..9 --policy global --expert-bytes 42MiB").unwrap();
        assert_eq!((args.load_steps, args.policy, args.expert_bytes), (Some((3, 9)), Policy::Global, Some(42 << 20)));
        assert_eq!(sizes(&args, 256), Sizes { num_replicas: 288, num_groups: 8, num_nodes: 4, num_ranks: 32 });
        for line in
            ["--experts a --load-steps 3", "--experts a --load-steps 3..2", "--experts a --max-moves 3", "--ranks 4"]
        {
            assert!(parse(&format!("plan {line}")).is_err(), "{line}");
        }
    }

    #[test]
    fn experts_are_placed_and_moved() {
        let dir = tempfile::tempdir().unwrap();
        let loads =
            |layers: &str| fs::write(dir.path().join("loads.json"), format!("{{\"layers\": {layers}}}")).unwrap();
        let sizes = "--ranks 4 --nodes 2 --groups 2 --replicas 12";
        loads("[[8, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]");
        let first = plan(dir.path(), sizes).unwrap();
        assert_eq!(first["layers"][0]["physical_to_expert"].as_array().unwrap().len(), 12);
        assert_eq!(first["layers"][0]["hottest_num_replicas"], 4);
        let contiguous = first["layers"][0]["max_over_mean_contiguous"].as_f64().unwrap();
        assert!((contiguous - 9.0 * 4.0 / 15.0).abs() < 1e-12);
        for key in ["num_duplicates", "num_split_groups", "max_over_mean", "worst_max_over_mean"] {
            assert!(first[key].is_number(), "{key}: {first}");
        }
        assert_eq!((&first["num_moves"], &first["max_over_mean_before"]), (&Value::Null, &Value::Null));

        let current = dir.path().join("current.json");
        fs::rename(dir.path().join("placement.json"), &current).unwrap();
        loads("[[1, 1, 1, 1, 1, 1, 1, 8], [1, 1, 1, 1, 1, 1, 1, 1]]");
        let with = |max_moves: usize| {
            let arguments =
                format!("{sizes} --current {} --max-moves {max_moves} --expert-bytes 1kB", current.display());
            plan(dir.path(), &arguments).unwrap()
        };
        let number = |document: &Value, key: &str| document[key].as_f64().unwrap();
        let (none, two) = (with(0), with(2));
        assert_eq!(none["max_over_mean"], none["max_over_mean_before"]);
        assert_eq!((number(&none, "num_moves"), number(&none, "moved_bytes")), (0.0, 0.0));
        assert!(number(&two, "max_over_mean") < number(&none, "max_over_mean"));
        assert_eq!(number(&two, "moved_bytes"), 1000.0 * number(&two, "num_moves"));
        assert_eq!(two["layers"][0]["num_moves"], two["num_moves"], "the other layer is balanced");
        assert_eq!(two["moves"].as_array().unwrap().len() as f64, number(&two, "num_moves"));
    }

    #[test]
    fn all_that_does_not_fit_is_said() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("loads.json"), "{\"layers\": [[1, 2, 3, 4]]}").unwrap();
        let message = plan(dir.path(), "--ranks 3 --nodes 2 --groups 3 --replicas 5").unwrap_err();
        assert_eq!(message.lines().count(), 3, "{message}");
        let placement = dir.path().join("other.json");
        fs::write(&placement, "{\"layers\": [{}]}").unwrap();
        let arguments = format!("--ranks 2 --nodes 1 --groups 1 --current {}", placement.display());
        let message = plan(dir.path(), &arguments).unwrap_err();
        assert!(message.contains("other.json:1: expected `layers` with `physical_to_expert`"), "{message}");
    }
}
