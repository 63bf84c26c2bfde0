//! Lists the committed PTX texts (`ptx/*.ptx`) as a table of `include_str!`, so that adding a kernel needs no list of files. The table names
//! no folder: one target directory may serve several checkouts.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=ptx");
    let root = env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?;
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let mut stems = vec![];
    for entry in fs::read_dir(Path::new(&root).join("ptx"))? {
        let path = entry?.path();
        if let (Some("ptx"), Some(stem)) = (path.extension().and_then(|e| e.to_str()), path.file_stem()) {
            stems.push(stem.to_string_lossy().into_owned());
        }
    }
    stems.sort();
    let line = |stem: &String| {
        format!("    ({stem:?}, include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/ptx/{stem}.ptx\"))),\n")
    };
    let lines: String = stems.iter().map(line).collect();
    let table =
        format!("/// Stem and text of each committed file, sorted.\nconst FILES: &[(&str, &str)] = &[\n{lines}];\n");
    fs::write(Path::new(&out).join("golden.rs"), table)
}
