//! Every committed kernel goes through NVIDIA's assembler: no spills, no stack, registers within plan, and no warning that it gave
//! up what the kernel asked for (C7508: setmaxnreg ignored; C7510 to C7515: wgmma serialized).
//!
//! `HADAL_PTXAS` names the assemblers, separated by `:`, as `.ci/run` installs them; without it the test says that it is skipped.

use std::{
    env,
    io::{self, Write as _},
    path::Path,
    process::Command,
};

use kernels::ptx::{
    Arch,
    golden::{Variant, stem, variants},
};
use rayon::prelude::*;

/// What text for `arch` must assemble for.
fn targets(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::Sm80 => &["sm_80", "sm_90a"],
        Arch::Sm90 => &["sm_90", "sm_90a"],
        Arch::Sm90a => &["sm_90a"],
    }
}

/// The number in front of `what`.
fn number_before(text: &str, what: &str) -> Option<u32> {
    text[..text.find(what)?].rsplit(' ').next()?.parse().ok()
}

/// Registers, or what is wrong.
fn assemble(ptxas: &str, text: &Path, target: &str, max_registers: u32) -> Result<u32, String> {
    let run = Command::new(ptxas).arg("-v").arg(format!("-arch={target}")).arg(text).args(["-o", "/dev/null"]).output();
    let run = run.map_err(|e| format!("does not start: {e}"))?;
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    if !run.status.success() || said.contains("(C75") {
        return Err(said);
    }
    for what in [" bytes stack frame", " bytes spill stores", " bytes spill loads"] {
        if number_before(&said, what).ok_or(format!("says nothing of{what}: {said}"))? > 0 {
            return Err(format!("{}{what}", number_before(&said, what).unwrap_or_default()));
        }
    }
    match number_before(&said, " registers").ok_or(format!("says nothing of registers: {said}"))? {
        used if used > max_registers => Err(format!("{used} registers, {max_registers} planned")),
        used => Ok(used),
    }
}

#[test]
fn committed_kernels_assemble_within_plan() {
    let assemblers = env::var("HADAL_PTXAS").unwrap_or_default();
    let assemblers: Vec<&str> = assemblers.split(':').filter(|path| !path.is_empty()).collect();
    if assemblers.is_empty() {
        // Past the harness, which keeps what passing tests print to itself.
        let _ = io::stderr().write_all(b"SKIPPED: no kernel was assembled, because HADAL_PTXAS names no ptxas\n");
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("ptx");
    let mut jobs = vec![];
    for Variant { kernel, max_registers } in variants() {
        let text = folder.join(format!("{}.ptx", stem(kernel.arch, &kernel.name)));
        for target in targets(kernel.arch) {
            jobs.extend(assemblers.iter().map(|ptxas| (*ptxas, text.clone(), *target, max_registers)));
        }
    }
    let results: Vec<_> = jobs
        .par_iter()
        .map(|(ptxas, text, target, max)| {
            let name = text.file_stem().unwrap_or_default().to_string_lossy();
            match assemble(ptxas, text, target, *max) {
                Ok(used) => Ok(format!("{name} for {target}: {used} of {max} registers")),
                Err(wrong) => Err(format!("{name} for {target} by {ptxas}: {wrong}")),
            }
        })
        .collect();
    let wrong: Vec<&String> = results.iter().filter_map(|r| r.as_ref().err()).collect();
    results.iter().flatten().for_each(|line| eprintln!("{line}"));
    assert!(
        wrong.is_empty(),
        "{} of {} do not pass:\n{}",
        wrong.len(),
        jobs.len(),
        wrong.iter().map(|w| format!("{w}\n")).collect::<String>()
    );
}
