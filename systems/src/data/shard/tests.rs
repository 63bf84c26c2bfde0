//! What a shard promises: exact round trips, and a named error for every damaged or hostile pair of files.

#![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
use super::*;

const ORIGIN: Origin = Origin { source: [1; 32], tokenizer: [2; 32] };

fn write(bin: &Path, vocab_size: usize, documents: &[(&[u32], u64)]) -> Result<Shard, ShardError> {
    let mut writer = ShardWriter::create(bin, vocab_size, ORIGIN)?;
    for (tokens, num_bytes) in documents {
        writer.push(tokens, *num_bytes)?;
    }
    writer.finish()
}

fn documents(shard: &Shard) -> Vec<(Vec<u32>, u64)> {
    let read = |document| {
        let mut tokens = Vec::new();
        shard.read(document, 0..shard.document_tokens(document), &mut tokens);
        (tokens, shard.document_bytes(document))
    };
    (0..shard.num_documents()).map(read).collect()
}

/// Token ids and UTF-8 bytes.
type Document<'a> = (&'a [u32], u64);

#[test]
fn a_shard_gives_back_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(usize, &[Document], u64); 4] = [
        (65_536, &[(&[0, 65_535, 7], 9), (&[], 0), (&[3], 2)], 8),
        (65_537, &[(&[65_536], 1), (&[0, 1], 5)], 12),
        (usize::MAX, &[(&[u32::MAX], 1)], 4),
        (257, &[], 0),
    ];
    for (vocab_size, expected, file_bytes) in cases {
        let bin = dir.path().join("new/folder/x.bin");
        let shard = write(&bin, vocab_size, expected).unwrap();
        let owned: Vec<(Vec<u32>, u64)> = expected.iter().map(|(tokens, bytes)| (tokens.to_vec(), *bytes)).collect();
        assert_eq!(documents(&shard), owned);
        assert_eq!(documents(&Shard::from_documents(owned)), documents(&shard));
        assert_eq!(shard.num_tokens() as usize, expected.iter().map(|(tokens, _)| tokens.len()).sum::<usize>());
        assert_eq!(shard.num_bytes(), expected.iter().map(|(_, bytes)| bytes).sum::<u64>());
        assert_eq!(shard.origin(), ORIGIN);
        assert_eq!(fs::metadata(&bin).unwrap().len(), file_bytes);
        assert_eq!(fs::read_dir(bin.parent().unwrap()).unwrap().count(), 2, "temporary files are left");
    }
}

#[test]
fn part_of_a_document_can_be_read() {
    let shard = Shard::from_documents([(vec![9], 1), (vec![1, 2, 3, 4], 4)]);
    let mut tokens = vec![5];
    shard.read(1, 1..3, &mut tokens);
    assert_eq!(tokens, [5, 2, 3]);
}

#[test]
fn tokens_outside_of_the_vocabulary_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("x.bin");
    let error = write(&bin, 300, &[(&[1], 1), (&[2, 300], 1)]).unwrap_err().to_string();
    assert!(error.contains("document 1 has token id 300 at index 1, the vocabulary has 300 tokens"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "an abandoned shard leaves files");

    let shard = write(&bin, 300, &[(&[1], 1), (&[2, 299], 1)]).unwrap();
    assert!(shard.check_vocab(300).is_ok());
    let error = shard.check_vocab(299).unwrap_err().to_string();
    assert!(error.contains("document 1 has token id 299 at index 1"), "{error}");
}

#[test]
fn damaged_and_hostile_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("x.bin");
    let idx = dir.path().join("x.idx");
    write(&bin, 300, &[(&[1, 2, 3], 5), (&[4], 1)]).unwrap();
    let (good_bin, good_idx) = (fs::read(&bin).unwrap(), fs::read(&idx).unwrap());
    let patched = |at: usize, bytes: &[u8]| {
        let mut index = good_idx.clone();
        index[at..at + bytes.len()].copy_from_slice(bytes);
        index
    };
    let long = |value: u64| value.to_le_bytes();
    let cases: [(&[u8], Vec<u8>, &str); 18] = [
        (&good_bin[..7], good_idx.clone(), "x.bin: expected 4 tokens of 2 bytes, found a file of 7 bytes"),
        (&[], good_idx.clone(), "found a file of 0 bytes"),
        (&[good_bin.clone(), vec![0]].concat(), good_idx.clone(), "found a file of 9 bytes"),
        (&good_bin, vec![], "x.idx: expected an index of at least 104 bytes, found 0 bytes"),
        (&good_bin, good_idx[..103].to_vec(), "found 103 bytes"),
        (&good_bin, good_idx[..104].to_vec(), "expected offsets of 2 documents, found 0 bytes"),
        (&good_bin, good_idx[..good_idx.len() - 1].to_vec(), "expected offsets of 2 documents, found 47 bytes"),
        (&good_bin, patched(0, b"X"), "starts with `HADALIDX`"),
        (&good_bin, patched(8, &[2]), "expected index version 1, found version 2"),
        (&good_bin, patched(12, &[3]), "expected 2 or 4 bytes per token, found 3"),
        (&good_bin, patched(12, &[4]), "expected 4 tokens of 4 bytes"),
        (&good_bin, patched(16, &long(5)), "token offsets that ascend from 0 to 5"),
        (&good_bin, patched(24, &long(u64::MAX)), "expected offsets of 18446744073709551615 documents"),
        (&good_bin, patched(24, &long((1 << 60) + 2)), "documents, found 48 bytes"),
        (&good_bin, patched(32, &long(7)), "byte offsets that ascend from 0 to 7"),
        (&good_bin, patched(104, &long(1)), "token offsets that ascend"),
        (&good_bin, patched(112, &long(5)), "token offsets that ascend"),
        (
            &good_bin,
            [patched(16, &long(u64::MAX))[..120].to_vec(), long(u64::MAX).to_vec(), good_idx[128..].to_vec()].concat(),
            "expected 18446744073709551615 tokens of 2 bytes",
        ),
    ];
    for (bin_bytes, idx_bytes, expected) in cases {
        fs::write(&bin, bin_bytes).unwrap();
        fs::write(&idx, &idx_bytes).unwrap();
        let error = Shard::open(&bin).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn a_missing_half_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("x.bin");
    write(&bin, 300, &[(&[1], 1)]).unwrap();
    fs::remove_file(&bin).unwrap();
    assert!(Shard::open(&bin).unwrap_err().to_string().contains("cannot map the token shard file"));
    fs::remove_file(bin.with_extension("idx")).unwrap();
    assert!(Shard::open(&bin).unwrap_err().to_string().contains("x.idx"));
}
