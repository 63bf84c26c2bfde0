//! Lists the committed PTX texts (`ptx/*.ptx`) as a table of `include_str!`, so that adding a kernel needs no list of files.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=ptx");
    let root = env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?;
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let mut files = vec![];
    for entry in fs::read_dir(Path::new(&root).join("ptx"))? {
        let path = entry?.path();
        if let (Some("ptx"), Some(stem)) = (path.extension().and_then(|e| e.to_str()), path.file_stem()) {
            files.push((stem.to_string_lossy().into_owned(), path.to_string_lossy().into_owned()));
        }
    }
    files.sort();
    let lines: String = files.iter().map(|(stem, path)| format!("    ({stem:?}, include_str!({path:?})),\n")).collect();
    let table =
        format!("/// Stem and text of each committed file, sorted.\nconst FILES: &[(&str, &str)] = &[\n{lines}];\n");
    fs::write(Path::new(&out).join("golden.rs"), table)
}
