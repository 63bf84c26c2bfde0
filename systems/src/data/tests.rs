//! The whole way from files to batches, and the cache.

#![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
use std::fs;

use super::*;
use packing::{IGNORE, Packing, Rows};
use validation::Validation;

fn moby_dick() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenes/data/moby-dick.txt")
}

fn spec(dir: &Path, files: &[(&str, &str)], tokenizer: TokenizerSource) -> DataSpec {
    let write = |(name, text): &(&str, &str)| {
        fs::write(dir.join(name), text).unwrap();
        dir.join(name)
    };
    DataSpec {
        files: files.iter().map(write).collect(),
        held_out: Some(HeldOut(0.1)),
        tokenizer,
        cache: dir.join("cache"),
    }
}

fn texts(data: &Data, corpus: &Corpus) -> Vec<String> {
    let read = |document| {
        let mut tokens = Vec::new();
        corpus.read(document, 0..corpus.document_tokens(document), &mut tokens);
        data.tokenizer.decode(&tokens, false)
    };
    (0..corpus.num_documents()).map(read).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn moby_dick_is_the_text_its_readme_describes() {
    let text = fs::read_to_string(moby_dick()).unwrap();
    assert_eq!(text.len(), 1_204_997);
    let (train, held_out) = HeldOut(0.1).split(vec![text.clone()]).unwrap();
    assert_eq!((train[0].len(), held_out[0].len()), (1_084_498, 120_499));
    assert!(held_out[0].starts_with(" accidents like this have in more than"), "{}", &held_out[0][..60]);
    assert_eq!(train.concat() + &held_out.concat(), text);
}

#[test]
fn from_a_file_to_batches_and_back_to_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(moby_dick()).unwrap()[..60_000].to_owned() + "€";
    let spec = spec(dir.path(), &[("book.txt", &text)], TokenizerSource::Train { vocab_size: 600 });
    let data = prepare(&spec).unwrap();
    assert_eq!(texts(&data, &data.train).concat() + &texts(&data, &data.held_out).concat(), text);
    assert_eq!(data.train.num_bytes() + data.held_out.num_bytes(), text.len() as u64);

    let packing = Packing {
        seq_len: 64,
        end_of_text: data.tokenizer.end_of_text(),
        num_mtp: 0,
        cross_document_attention: false,
        refuse_long_documents: false,
        end_targets: true,
    };
    let validation = Validation::new(data.held_out.clone(), packing).unwrap();
    let targets: Vec<u32> =
        validation.batches(4).flat_map(|batch| batch.targets).filter(|target| *target != IGNORE).collect();
    assert_eq!(data.tokenizer.decode(&targets, false), texts(&data, &data.held_out)[0]);
    assert_eq!(validation.num_bytes(), 6000);
    assert_eq!(Rows::new(data.train.clone(), packing).unwrap().num_positions(), data.train.num_tokens() + 1);
}

#[test]
fn the_tokenizer_never_sees_the_held_out_text() {
    let dir = tempfile::tempdir().unwrap();
    let train = TokenizerSource::Train { vocab_size: 300 };
    let text = "a whale of a whale, ".repeat(450);
    let one = prepare(&spec(dir.path(), &[("a.txt", &(text.clone() + &"z".repeat(1000)))], train.clone())).unwrap();
    let two = prepare(&spec(dir.path(), &[("a.txt", &(text + &"q".repeat(1000)))], train)).unwrap();
    assert_eq!(one.tokenizer.to_json().unwrap(), two.tokenizer.to_json().unwrap());
    assert_ne!(one.held_out.digest(), two.held_out.digest());
    assert_eq!(one.train.digest(), two.train.digest());
}

#[test]
fn the_cache_is_used_and_stale_or_damaged_parts_are_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let train = TokenizerSource::Train { vocab_size: 300 };
    let documents = "{\"text\":\"one whale\"}\n{\"text\":\"two whales\"}\n";
    let first = spec(dir.path(), &[("a.jsonl", documents)], train.clone());
    let expected = texts(&prepare(&first).unwrap(), &prepare(&first).unwrap().train);
    assert_eq!(expected, ["one whale"]);
    let made = names(&first.cache);
    assert_eq!(made.len(), 5, "a tokenizer and two shards: {made:?}"); // .json, 2 x (.bin, .idx)

    // Each file damaged in turn: truncated, then deleted.
    for name in &made {
        let path = first.cache.join(name);
        let good = fs::read(&path).unwrap();
        for damage in [true, false] {
            if damage {
                fs::write(&path, &good[..good.len() / 2]).unwrap()
            } else {
                fs::remove_file(&path).unwrap()
            }
            let data = prepare(&first).unwrap();
            assert_eq!(texts(&data, &data.train), expected, "{name}");
            assert!(fs::read(&path).unwrap() == good, "{name} is not what it was");
        }
    }
    assert_eq!(names(&first.cache), made);

    // A used cache is not written again.
    let written = |name: &String| fs::metadata(first.cache.join(name)).unwrap().modified().unwrap();
    let before: Vec<_> = made.iter().map(written).collect();
    prepare(&first).unwrap();
    assert_eq!(made.iter().map(written).collect::<Vec<_>>(), before);

    // An edited corpus does not meet the old shards.
    let edited = spec(dir.path(), &[("a.jsonl", &documents.replace("one", "1"))], train);
    let data = prepare(&edited).unwrap();
    assert_eq!(texts(&data, &data.train), ["1 whale"]);
    assert_eq!(texts(&data, &data.held_out), ["two whales"]);
}

#[test]
fn shards_are_a_corpus_too() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::train(&["x".to_owned()], 300).unwrap();
    let json = dir.path().join("tokenizer.json");
    tokenizer.save(&json).unwrap();
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let files = [("b.bin", &["aaaa", "bb"][..]), ("a.bin", &["cccc", "d"])].map(|(name, documents)| {
        let bin = dir.path().join(name);
        write_shard(&bin, &owned(documents), &tokenizer).unwrap();
        bin
    });
    let spec =
        |held_out, tokenizer| DataSpec { files: files.to_vec(), held_out, tokenizer, cache: dir.path().join("cache") };
    let file = TokenizerSource::File(json.clone());
    let data = prepare(&spec(Some(HeldOut(0.1)), file.clone())).unwrap();
    assert_eq!(texts(&data, &data.train), ["aaaa", "bb", "cccc"]);
    assert_eq!(texts(&data, &data.held_out), ["d"]);
    assert_eq!(data.held_out.num_bytes(), 1);
    let data = prepare(&spec(None, file.clone())).unwrap();
    assert_eq!((data.train.num_documents(), data.held_out.num_documents()), (4, 0));

    let error = prepare(&spec(None, TokenizerSource::Train { vocab_size: 300 })).unwrap_err().to_string();
    assert!(error.contains("b.bin: a tokenizer cannot be trained on a pre-tokenized shard"), "{error}");
    Tokenizer::train(&owned(&["xxyxxyxxy"]), 300).unwrap().save(&json).unwrap();
    let error = prepare(&spec(None, file)).unwrap_err().to_string();
    assert!(error.contains("b.bin: the shard was made with another tokenizer"), "{error}");
}
