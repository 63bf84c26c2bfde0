//! Determinism first: ids must never depend on threads or hash seeds.

#![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
use super::*;
use crate::data::corpus::hex;

/// The first tenth of Moby-Dick.
fn book() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenes/data/moby-dick.txt");
    let text = fs::read_to_string(path).unwrap();
    text[..text.floor_char_boundary(120_000)].to_owned()
}

/// Words of two letters: ties between pairs at every merge, and the same token made in many ways.
fn ties(seed: u64) -> Vec<String> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let word = |next: &mut dyn FnMut() -> u64| {
        (0..1 + next() % 12).map(|_| ['a', 'b'][next() as usize % 2]).collect::<String>()
    };
    (0..20).map(|_| (0..30).map(|_| word(&mut next) + " ").collect()).collect()
}

fn json_with_threads(documents: &[String], vocab_size: usize, num_threads: usize) -> String {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(num_threads).build().unwrap();
    pool.install(|| Tokenizer::train(documents, vocab_size).unwrap().to_json().unwrap())
}

#[test]
fn training_is_deterministic_in_every_process() {
    // Hash seeds differ between processes; the digest must not. It changes with the trainer, and then so do all token ids.
    let digest = Tokenizer::train(&[book()], 2000).unwrap().sha256();
    assert_eq!(hex(&digest[..8]), "978676dcd1432270");
}

#[test]
fn training_is_deterministic_on_any_number_of_threads() {
    let book = [book()];
    let expected = json_with_threads(&book, 2000, 1);
    for num_threads in [1, 2, 4] {
        assert!(json_with_threads(&book, 2000, num_threads) == expected, "{num_threads} threads");
    }
}

#[test]
fn training_is_deterministic_where_pairs_tie() {
    for seed in 0..40 {
        let documents = ties(seed);
        let expected = json_with_threads(&documents, 600, 1);
        for num_threads in [1, 3] {
            assert!(json_with_threads(&documents, 600, num_threads) == expected, "seed {seed}, {num_threads} threads");
        }
    }
}

#[test]
fn a_trained_tokenizer_has_the_size_asked_for_and_end_of_text_at_0() {
    let tokenizer = Tokenizer::train(&[book()], 700).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text()), (700, 0));
    assert_eq!(tokenizer.decode(&[0], false), END_OF_TEXT);
    assert_eq!(tokenizer.decode(&[0], true), "");
    let text = "Call me Ishmael. Some years ago";
    assert!(tokenizer.encode(text).unwrap().len() < text.len() * 2 / 3);
    // A text without repetition leaves the bytes; one byte each.
    let bytes = Tokenizer::train(&["x".to_owned()], 700).unwrap();
    assert_eq!(bytes.vocab_size(), MIN_VOCAB_SIZE);
    assert_eq!(bytes.encode("é!").unwrap().len(), 3);
    assert!(matches!(Tokenizer::train(&["x".to_owned()], 256), Err(TokenizerError::TooSmall(256))));
}

#[test]
fn every_text_comes_back() {
    let tokenizer = Tokenizer::train(&[book()], 1000).unwrap();
    let spaces = " ".repeat(300_000) + &"\n".repeat(3000) + &"a".repeat(3000);
    for text in [
        "",
        " ",
        "  two  spaces \r\n\t",
        "naïve café 海 🐋",
        "\u{FFFD}\0\u{7f}",
        "<|endoftext|>",
        "'s'S 12345",
        &spaces,
    ] {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
        assert!(!ids.contains(&0), "a corpus must not contain separators");
    }
}

#[test]
fn special_tokens_are_special_only_where_asked() {
    let tokenizer = Tokenizer::train(&[book()], 400).unwrap();
    let text = "end<|endoftext|>start";
    assert!(tokenizer.encode(text).unwrap().iter().all(|id| *id != 0));
    let ids = tokenizer.encode_with_special(text).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 0).count(), 1);
    assert_eq!(tokenizer.decode(&ids, true), "endstart");
}

#[test]
fn a_stream_holds_back_unfinished_characters_only() {
    let tokenizer = Tokenizer::train(&["x".to_owned()], MIN_VOCAB_SIZE).unwrap();
    let stream = |ids: &[u32]| {
        let mut stream = tokenizer.decode_stream(true);
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
        pieces.push(stream.finish());
        assert_eq!(pieces.concat(), tokenizer.decode(ids, true));
        pieces
    };
    let id = |byte: u8| (1..257).find(|id| *tokenizer.tokens[*id as usize].bytes == [byte]).unwrap();
    let ids = |bytes: &[u8]| bytes.iter().map(|byte| id(*byte)).collect::<Vec<_>>();
    assert_eq!(stream(&ids("aé海🐋".as_bytes())), ["a", "", "é", "", "", "海", "", "", "", "🐋", ""]);
    assert_eq!(stream(&ids(b"\xe6\xb5a")), ["", "", "\u{FFFD}a", ""]); // broken off by a byte that cannot follow
    assert_eq!(stream(&ids(b"\xffa\x80")), ["\u{FFFD}", "a", "\u{FFFD}", ""]); // never a character: given out at once
    assert_eq!(stream(&ids(b"a\xf0\x9f")), ["a", "", "", "\u{FFFD}"]); // the stream ends
    assert_eq!(stream(&ids("\u{FFFD}".as_bytes())), ["", "", "\u{FFFD}", ""]);
    assert_eq!(stream(&[id(b'a'), 0, 4_000_000]), ["a", "", "", ""]); // special and unassigned ids
}

#[test]
fn documents_encode_in_parallel_as_they_do_alone() {
    let book = book();
    let tokenizer = Tokenizer::train(std::slice::from_ref(&book), 800).unwrap();
    let documents: Vec<String> = book.split("\n\n").map(str::to_owned).collect();
    let encoded = tokenizer.encode_documents(&documents).unwrap();
    for (document, ids) in documents.iter().zip(encoded) {
        assert_eq!(tokenizer.encode(document).unwrap(), ids);
    }
}

#[test]
fn a_saved_tokenizer_is_the_same_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let tokenizer = Tokenizer::train(&[book()], 500).unwrap();
    tokenizer.save(&path).unwrap();
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!(loaded.sha256(), tokenizer.sha256());
    assert_eq!(loaded.vocab_size(), 500);
    assert_eq!(loaded.encode("a whale").unwrap(), tokenizer.encode("a whale").unwrap());
    assert_ne!(Tokenizer::train(&[book()], 501).unwrap().sha256(), tokenizer.sha256());
}

#[test]
fn the_vocabulary_must_fit_the_model() {
    let tokenizer = Tokenizer::train(&[book()], 300).unwrap();
    assert!(tokenizer.check_model(300).is_ok() && tokenizer.check_model(1024).is_ok());
    let error = tokenizer.check_model(299).unwrap_err().to_string();
    assert!(error.contains("the tokenizer has 300 tokens but the model's vocab_size is 299"), "{error}");
}

#[test]
fn files_that_cannot_be_used_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let good = Tokenizer::train(&["x".to_owned()], 300).unwrap().to_json().unwrap();
    let cases = [
        ("{", "invalid JSON"),
        ("[]", "model/type \"none\" instead of \"BPE\""),
        (r#"{"model":{"type":"WordPiece"}}"#, "model/type \"WordPiece\" instead of \"BPE\""),
        (
            r#"{"model":{"type":"BPE"},"decoder":{"type":"Metaspace"}}"#,
            "decoder/type \"Metaspace\" instead of \"ByteLevel\"",
        ),
        (&good.replace(END_OF_TEXT, "<|stop|>"), "none of the end-of-text tokens <|endoftext|>"),
        (&good.replace("\"!\"", "\"€\""), "which is not in the byte alphabet"),
        (&good.replace("\"!\": 1", "\"!\": 4294967295"), "token id 4294967295, above 16777215"),
    ];
    for (json, expected) in cases {
        fs::write(&path, json).unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer.json: expected a byte-level BPE tokenizer.json, found ")
                && error.contains(expected),
            "{error}"
        );
    }
    assert!(
        Tokenizer::load(&dir.path().join("none.json"))
            .unwrap_err()
            .to_string()
            .starts_with("cannot read the tokenizer")
    );
}

#[test]
fn truncation_in_the_file_does_not_cut_documents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let good = Tokenizer::train(&["x".to_owned()], 300).unwrap().to_json().unwrap();
    let truncation = r#""truncation": {"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0}"#;
    fs::write(&path, good.replace("\"truncation\": null", truncation)).unwrap();
    assert!(fs::read_to_string(&path).unwrap().contains("max_length"));
    assert_eq!(Tokenizer::load(&path).unwrap().encode("whale").unwrap().len(), 5);
}
