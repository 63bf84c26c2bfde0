//! Arguments of `launch`: a verb with a verb for each launcher.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::Overrides;

/// Arguments of `launch`.
#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Who starts the processes.
    #[command(subcommand)]
    pub launcher: Launcher,
}

/// Who starts the processes.
#[derive(Debug, Subcommand)]
pub enum Launcher {
    /// Write a batch file for Slurm's `sbatch`, which goes on after a preemption or the loss of a node
    Slurm(SlurmArgs),
    /// Write an MPIJob for Kubernetes with Kubeflow's MPI operator
    K8s(K8sArgs),
}

/// What is started, on how many nodes.
#[derive(Debug, Args)]
pub struct Placed {
    /// Scene file, where all nodes find it
    pub scene: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Nodes; without it as many as the scene's mesh needs at its `ranks_per_node`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "ranks_per_node")]
    pub nodes: Option<u32>,
    /// Ranks of a node; without it the scene's `mesh.ranks_per_node`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub ranks_per_node: Option<u32>,
    /// Processor cores of a rank; without it Slurm gives whole nodes, and pods have no limit
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cores_per_rank: Option<u32>,
    /// File to write, which must not be there yet; without it only stdout has the text
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of `launch slurm`.
#[derive(Debug, Args)]
#[command(after_help = "\
The file starts `hadal run SCENE --resume` with srun, in the folder that it was made in. Ranks are told before the time is up, save a
checkpoint and exit with 143; then, and when a rank or a node is lost, the job goes back into the queue, and on from the newest
whole checkpoint. Other exit codes end it.

Examples:
  hadal launch slurm scenes/cluster.ron
  hadal launch slurm scenes/cluster.ron --time 1-00:00:00 --spare-nodes 1 --out cluster.sbatch && sbatch cluster.sbatch")]
pub struct SlurmArgs {
    #[command(flatten)]
    pub placed: Placed,
    /// Partition; without it the cluster's default
    #[arg(long, value_name = "NAME", value_parser = slurm_word)]
    pub partition: Option<String>,
    /// Account that pays
    #[arg(long, value_name = "NAME", value_parser = slurm_word)]
    pub account: Option<String>,
    /// Limit of time, as Slurm writes it: minutes, or [days-]hours:minutes:seconds
    #[arg(long, value_name = "TIME", value_parser = slurm_time)]
    pub time: Option<String>,
    /// Seconds before the end at which ranks are told to save: more than a checkpoint takes, and 5 s
    #[arg(long, value_name = "SECS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=65535))]
    pub signal_secs: u32,
    /// Nodes to have besides, idle: a node that is lost is replaced without going back into the queue
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub spare_nodes: u32,
}

/// Arguments of `launch k8s`.
#[derive(Debug, Args)]
#[command(after_help = "\
The image has `hadal`, built with --no-default-features, an MPI library with its mpiexec, and sshd, through which the operator's
launcher reaches workers. Scene and run folder are on a volume that all pods share.

Examples:
  hadal launch k8s scenes/cluster.ron --image registry.example/hadal:1 --claim training --out cluster.yaml
  kubectl apply -f cluster.yaml")]
pub struct K8sArgs {
    #[command(flatten)]
    pub placed: Placed,
    /// Image of all pods
    #[arg(long, value_name = "IMAGE", value_parser = image)]
    pub image: String,
    /// Name of the job; without it the scene's, with `-` for what cannot stand in one
    #[arg(long, value_name = "NAME", value_parser = dns_label)]
    pub name: Option<String>,
    /// Claim of the volume that all pods share
    #[arg(long, value_name = "NAME", value_parser = dns_label)]
    pub claim: String,
    /// Where the volume is in the pods; also the folder that the scene's path starts from
    #[arg(long, value_name = "DIR", default_value = "/hadal", value_parser = absolute)]
    pub mount: String,
    /// MPI of the image
    #[arg(long, value_name = "MPI", default_value = "mpich")]
    pub mpi: Mpi,
}

/// An MPI, by what its launcher understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mpi {
    /// MPICH, or what its launcher, Hydra, starts
    Mpich,
    /// Open MPI
    Openmpi,
}

/// A line of `#SBATCH` has rules of its own for quotes: what would need some is refused.
fn slurm_word(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_.-,+@:/".contains(c);
    let holds = !text.is_empty() && !text.starts_with('-') && text.chars().all(is_plain);
    if holds { Ok(text.to_owned()) } else { Err("expected letters, digits and _.-,+@:/ only".into()) }
}

fn slurm_time(text: &str) -> Result<String, String> {
    let (days, rest) = text.split_once('-').map_or((None, text), |(days, rest)| (Some(days), rest));
    let numbers: Vec<&str> = days.into_iter().chain(rest.split(':')).collect();
    let is_number = |part: &&str| !part.is_empty() && part.len() < 6 && part.chars().all(|c| c.is_ascii_digit());
    let holds = numbers.iter().all(is_number) && rest.split(':').count() <= 3;
    if holds { Ok(text.to_owned()) } else { Err("expected a time such as 90, 12:00:00 or 2-00:00:00".into()) }
}

/// Seconds of what [`slurm_time`] takes: minutes, minutes:seconds or hours:minutes:seconds, or from days on hours and less.
pub fn slurm_secs(text: &str) -> u64 {
    let (days, rest) = text.split_once('-').map_or((None, text), |(days, rest)| (Some(days), rest));
    let number = |text: &str| text.parse::<u64>().unwrap_or_default();
    let units: &[u64] = if days.is_none() && rest.split(':').count() < 3 { &[60, 1] } else { &[3600, 60, 1] };
    days.map_or(0, number) * 86_400 + rest.split(':').zip(units).map(|(part, unit)| number(part) * unit).sum::<u64>()
}

fn image(text: &str) -> Result<String, String> {
    let holds = !text.is_empty() && !text.contains(char::is_whitespace);
    if holds { Ok(text.to_owned()) } else { Err("expected an image such as registry.example/hadal:1".into()) }
}

fn absolute(text: &str) -> Result<String, String> {
    if text.starts_with('/') { Ok(text.to_owned()) } else { Err("expected a path from / on".into()) }
}

fn dns_label(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let holds = (1..=54).contains(&text.len())
        && text.chars().all(is_plain)
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-');
    if holds { Ok(text.to_owned()) } else { Err("expected a-z, 0-9 and - only, from a letter on, 54 at most".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_time_is_read_as_slurm_reads_it() {
        for (text, secs) in [("90", 5400), ("2:30", 150), ("1:02:03", 3723), ("2-00", 172_800), ("1-1:2:3", 90_123)] {
            assert_eq!(slurm_secs(text), secs, "{text}");
        }
    }

    #[test]
    fn what_slurm_and_kubernetes_could_not_read_is_refused() {
        for (text, holds) in
            [("gpu", true), ("a-b,c_2", true), ("", false), ("-x", false), ("a b", false), ("a'", false)]
        {
            assert_eq!(slurm_word(text).is_ok(), holds, "{text}");
        }
        for (text, holds) in [
            ("90", true),
            ("12:00:00", true),
            ("2-00", true),
            ("2-00:00:00", true),
            ("1h", false),
            ("1:", false),
            ("1:2:3:4", false),
            ("", false),
            ("1\n#SBATCH --uid=0", false),
        ] {
            assert_eq!(slurm_time(text).is_ok(), holds, "{text}");
        }
        for (text, holds) in [("run-1", true), ("Run", false), ("1", false), ("a-", false), ("a_b", false), ("", false)]
        {
            assert_eq!(dns_label(text).is_ok(), holds, "{text}");
        }
    }
}
