//! The document rule of each format, and an error message for everything that can be wrong with a file.

#![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
use super::*;

/// A name and what is in it.
type NamedFile<'a> = (&'a str, &'a [u8]);

fn read(files: &[NamedFile]) -> Result<Vec<String>, String> {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = files
        .iter()
        .map(|(name, bytes)| {
            fs::write(dir.path().join(name), bytes).unwrap();
            dir.path().join(name)
        })
        .collect();
    let root = format!("{}/", dir.path().display());
    read_documents(&paths).map_err(|error| error.to_string().replace(&root, ""))
}

#[test]
fn documents_of_each_format_in_order() {
    let cases: [(&[NamedFile], &[&str]); 7] = [
        (&[("a.txt", b"one\n\x0ctwo\r\n")], &["one\n\x0ctwo\r\n"]),
        (&[("a.txt", b"one<|endoftext|>\ntwo<|endoftext|>\n")], &["one", "\ntwo"]),
        (&[("a.TXT", b"x")], &["x"]),
        (&[("b.txt", b"b"), ("a.txt", b"a")], &["b", "a"]),
        (&[("a.jsonl", b"{\"text\":\"x\\n\",\"id\":1}\n\n{\"text\":\"y\"}")], &["x\n", "y"]),
        (&[("a.jsonl", b"{\"text\":\"x<|endoftext|>y\"}\r\n")], &["x<|endoftext|>y"]),
        (&[("a.jsonl", b"{\"text\":\"j\"}"), ("a.txt", "é".as_bytes())], &["j", "é"]),
    ];
    for (files, expected) in cases {
        assert_eq!(read(files).unwrap(), expected, "{files:?}");
    }
}

#[test]
fn errors_name_the_place_what_was_expected_and_what_was_found() {
    let cases: [(&[NamedFile], &str); 14] = [
        (&[], "lists no file"),
        (&[("a.csv", b"x")], "a.csv: expected a name ending in .txt, .jsonl, .parquet or .bin"),
        (&[("a.txt", b"")], "a.txt: expected at least one document, found an empty file"),
        (&[("a.txt", b" \n")], "a.txt: expected at least one document, found only empty"),
        (&[("ok.txt", b"x"), ("a.txt", b"<|endoftext|>")], "a.txt: expected at least one document"),
        (&[("a.txt", b"ab\xffc")], "a.txt: expected UTF-8 text, found an invalid byte at offset 2"),
        (&[("a.jsonl", b"{\"text\":\"\xc3\"}")], "a.jsonl: expected UTF-8 text, found an invalid byte at offset 9"),
        (&[("a.jsonl", b"\n\n")], "a.jsonl: expected at least one document"),
        (
            &[("a.jsonl", b"{\"text\":\"x\"}\n{\"text\":")],
            "a.jsonl:2: expected a JSON object with a non-empty string field `text`, found invalid JSON",
        ),
        (
            &[("a.jsonl", b"\n{\"txt\":1,\"id\":2}")],
            "a.jsonl:2: expected a JSON object with a non-empty string field `text`, found no such field (the fields are: txt, id)",
        ),
        (&[("a.jsonl", b"{\"text\":7}")], "found a number in `text`"),
        (&[("a.jsonl", b"[1]")], "found an array instead of an object"),
        (
            &[("a.jsonl", b"{\"text\":\"\"}")],
            "a.jsonl:1: expected a JSON object with a non-empty string field `text`, found an empty text",
        ),
        (
            &[("a.txt", b"x"), ("b.bin", b"")],
            "b.bin: expected a text file like the files listed before it, found a pre-tokenized shard",
        ),
    ];
    for (files, expected) in cases {
        let error = read(files).unwrap_err();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = read_documents(&[PathBuf::from("no/such.txt")]).unwrap_err().to_string();
    assert!(error.starts_with("cannot read the corpus file no/such.txt: "), "{error}");
}

#[cfg(not(feature = "parquet"))]
#[test]
fn parquet_without_the_feature_says_what_to_do() {
    let error = read(&[("a.parquet", b"PAR1")]).unwrap_err();
    assert!(error.contains("a.parquet: this build reads no Parquet; build with `--features parquet`"), "{error}");
}
