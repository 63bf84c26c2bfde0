//! Which process this is among those that a launcher started, and the engine they meet through.
//!
//! What was said comes first, then torchrun's variables, Slurm's, and those of MPI's launchers (PMI, PMIx, Open MPI). What is found
//! must not contradict itself. Slurm's are about a process that `srun` started only, which is one of a step: a batch script has them
//! too, as rank 0 of many that nobody started. One more exception: `mpirun` in a Slurm allocation has its own processes started by
//! Slurm, whose variables are then not about this one. MPI itself has the last word, and must agree.

use std::{fmt, path::PathBuf};

use super::{Comm, mpi, nccl};
use crate::{
    device::Device,
    error::{Error, Result},
};

/// A process among others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// This one.
    pub rank: u32,
    /// All of them.
    pub num_ranks: u32,
    /// Who says so.
    pub source: &'static str,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} ({})", self.rank, self.num_ranks, self.source)
    }
}

/// Variables of rank and size, by launcher, first come first.
const SOURCES: [(&str, &str, &str); 5] = [
    ("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE"),
    (SLURM, "SLURM_PROCID", "SLURM_NTASKS"),
    ("PMI_RANK and PMI_SIZE", "PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK and _SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPI_RANKID and MPI_NRANKS", "MPI_RANKID", "MPI_NRANKS"),
];
const SLURM: &str = "SLURM_PROCID and SLURM_NTASKS";
/// Slurm's variable that only processes of a step have.
const SLURM_STEP: &str = "SLURM_STEP_ID";
/// The variable that names an MPI library.
const LIBRARY: &str = "HADAL_MPI";
/// The variable that names an NCCL library, or says that there is to be none.
const GPU_LIBRARY: &str = "HADAL_NCCL";
/// By which NCCL, from 2.30 on, lets two ranks share a GPU.
const SHARES_GPUS: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

/// Where this process is, by `said` (rank, number of ranks) or by variables; `None` if no launcher started it.
///
/// # Errors
/// If what is found contradicts itself, or is no place.
pub fn discover(said: Option<(u32, u32)>, variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Place>> {
    let number = |name: &str| -> Result<Option<u32>> {
        let Some(text) = variable(name) else { return Ok(None) };
        let found = |_| error(format!("expected a number in {name}, found `{text}`; unset it, or correct it"));
        text.trim().parse().map(Some).map_err(found)
    };
    let mut places: Vec<Place> = Vec::new();
    places.extend(said.map(|(rank, num_ranks)| Place { rank, num_ranks, source: "--rank and --num-ranks" }));
    let is_in_step = variable(SLURM_STEP).is_some();
    for (source, rank, size) in SOURCES.into_iter().filter(|(source, ..)| *source != SLURM || is_in_step) {
        match (number(rank)?, number(size)?) {
            (Some(rank), Some(num_ranks)) => places.push(Place { rank, num_ranks, source }),
            // Others than torchrun's may stand alone: a size in an allocation, say.
            (found, other) if source == SOURCES[0].0 && found.is_some() != other.is_some() => {
                let (found, missing) = if found.is_some() { (rank, size) } else { (size, rank) };
                return Err(error(format!("expected {missing} beside {found}, found none; set both, or neither")));
            }
            _ => (),
        }
    }
    if let Some(wrong) = places.iter().find(|place| place.rank >= place.num_ranks) {
        return Err(error(format!("there is no {wrong}; ranks count from 0")));
    }
    let same = |a: &Place, b: &Place| (a.rank, a.num_ranks) == (b.rank, b.num_ranks);
    let of_mpi = places.iter().find(|place| SOURCES[2..].iter().any(|(source, ..)| *source == place.source)).cloned();
    if let Some(of_mpi) = of_mpi {
        places.retain(|place| place.source != SLURM || same(place, &of_mpi));
    }
    let first = places.first().cloned();
    if let Some((first, other)) = first.as_ref().and_then(|a| Some((a, places.iter().find(|b| !same(a, b))?))) {
        return Err(error(format!(
            "the launcher contradicts itself: {first}, and {other}; unset the variables of the one that did not start this process"
        )));
    }
    Ok(first)
}

/// Meets the other processes of a launcher through MPI; with what engine, in words.
///
/// # Errors
/// If there is no library, or it says something else than the launcher.
pub fn join(place: &Place, ranks_per_node: u32, variable: &dyn Fn(&str) -> Option<String>) -> Result<(Comm, String)> {
    let libraries = libraries(variable);
    let libraries: Vec<_> = libraries.iter().map(PathBuf::as_path).collect();
    let (comm, version) = Comm::mpi(&libraries, ranks_per_node)?.map_err(|why| {
        error(format!(
            "{place} needs an MPI library, and none of these loads:\n  {}\nname one in {LIBRARY}, or add its folder to \
             LD_LIBRARY_PATH",
            why.join("\n  ")
        ))
    })?;
    if (comm.rank(), comm.num_ranks()) != (place.rank, place.num_ranks) {
        return Err(error(format!(
            "MPI finds rank {} of {}, where the launcher says {place}; start the processes with the mpiexec of that library ({version}), or \
             with srun --mpi=pmi2 for MPICH",
            comm.rank(),
            comm.num_ranks()
        )));
    }
    Ok((comm, version))
}

/// Version and file of the MPI library that processes would meet through, which is loaded for it and not started.
///
/// # Errors
/// What the loader said of each name, if none loads.
pub fn find_mpi(variable: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let libraries = libraries(variable);
    mpi::Hub::find(&libraries.iter().map(PathBuf::as_path).collect::<Vec<_>>()).map_err(|why| why.join("\n"))
}

/// Names under which MPI is looked for.
fn libraries(variable: &dyn Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    match variable(LIBRARY) {
        Some(path) => vec![path.into()],
        None => mpi::Hub::names().map(PathBuf::from).to_vec(),
    }
}

/// Which NCCL library is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nccl {
    /// None.
    Off,
    /// This file.
    At(PathBuf),
    /// The first of the usual names that loads.
    Usual,
}

impl Nccl {
    /// As `HADAL_NCCL` says: `none`, or a library's path.
    pub fn said(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        match variable(GPU_LIBRARY) {
            Some(text) if text == "none" => Nccl::Off,
            Some(path) => Nccl::At(path.into()),
            None => Nccl::Usual,
        }
    }

    /// Version and file of what this machine has; `Err` with the reason that there is none.
    ///
    /// # Errors
    /// If it is off, or does not load.
    pub fn find(&self) -> Result<String, String> {
        nccl::found(self)
    }
}

/// How processes with a GPU each meet there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus {
    /// This process's.
    pub device: Device,
    /// What moves tensors, if it is there.
    pub nccl: Nccl,
    /// Whether NCCL, from 2.30 on, is told that ranks may share a GPU.
    pub may_share: bool,
    /// Bytes of others' parts that wait on a GPU to be added, at most; the same on all ranks.
    pub staging_bytes: usize,
}

impl Gpus {
    /// As variables say it, with 64 MiB for parts: some MiB of each keep a link busy.
    pub fn said(device: Device, variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let may_share = variable(SHARES_GPUS).is_some_and(|text| text.trim() == "1");
        Gpus { device, nccl: Nccl::said(variable), may_share, staging_bytes: 64 << 20 }
    }
}

fn error(message: String) -> Error {
    Error::Comm { op: "launch", message }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn found(said: Option<(u32, u32)>, variables: &str) -> std::result::Result<Option<String>, String> {
        let value = |name: &str| {
            variables.split_whitespace().find_map(|pair| Some(pair.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
        };
        discover(said, &value).map(|place| place.map(|place| place.to_string())).map_err(|e| e.to_string())
    }

    #[test]
    fn launchers_are_known_by_their_variables_in_one_order() {
        let cases = [
            ("", None),
            // An allocation, a batch script in it, and a process that srun started.
            ("SLURM_NTASKS=4", None),
            ("SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_NODEID=0 SLURM_LOCALID=0", None),
            ("SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=4", Some("rank 0 of 4 (SLURM_PROCID and SLURM_NTASKS)")),
            (
                "RANK=1 WORLD_SIZE=2 SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2",
                Some("rank 1 of 2 (RANK and WORLD_SIZE)"),
            ),
            (
                "SLURM_STEP_ID=2 SLURM_PROCID=3 SLURM_NTASKS=4 PMI_RANK=3 PMI_SIZE=4",
                Some("rank 3 of 4 (SLURM_PROCID and SLURM_NTASKS)"),
            ),
            ("PMI_RANK=0 PMI_SIZE=2", Some("rank 0 of 2 (PMI_RANK and PMI_SIZE)")),
            // mpirun in an allocation, and mpiexec in a batch script.
            (
                "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8",
                Some("rank 5 of 8 (OMPI_COMM_WORLD_RANK and _SIZE)"),
            ),
            ("SLURM_PROCID=0 SLURM_NTASKS=4 PMI_RANK=1 PMI_SIZE=2", Some("rank 1 of 2 (PMI_RANK and PMI_SIZE)")),
        ];
        for (variables, want) in cases {
            assert_eq!(found(None, variables).unwrap().as_deref(), want, "{variables}");
        }
        assert_eq!(found(Some((0, 1)), "").unwrap().unwrap(), "rank 0 of 1 (--rank and --num-ranks)");
    }

    #[test]
    fn an_nccl_library_is_named_or_refused() {
        for (said, want) in
            [(None, Nccl::Usual), (Some("none"), Nccl::Off), (Some("/a/b.so"), Nccl::At("/a/b.so".into()))]
        {
            let variable = |name: &str| said.filter(|_| name == "HADAL_NCCL").map(str::to_owned);
            assert_eq!(Nccl::said(&variable), want);
        }
    }

    #[test]
    fn contradictions_are_refused_with_both_sides() {
        let cases = [
            (
                None,
                "RANK=1 WORLD_SIZE=2 PMI_RANK=0 PMI_SIZE=2",
                "rank 1 of 2 (RANK and WORLD_SIZE), and rank 0 of 2 (PMI",
            ),
            (Some((1, 4)), "RANK=1 WORLD_SIZE=2", "rank 1 of 4 (--rank and --num-ranks), and rank 1 of 2 (RANK"),
            (None, "RANK=1", "expected WORLD_SIZE beside RANK"),
            (None, "WORLD_SIZE=2", "expected RANK beside WORLD_SIZE"),
            (None, "RANK=2 WORLD_SIZE=2", "no rank 2 of 2"),
            (None, "PMI_RANK=x PMI_SIZE=2", "a number in PMI_RANK, found `x`"),
        ];
        for (said, variables, want) in cases {
            let message = found(said, variables).unwrap_err();
            assert!(message.contains(want), "{variables}: {message}");
        }
    }
}
