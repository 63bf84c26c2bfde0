//! Epochs, independence of batch size and ranks, and resuming at every sample.

#![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
use std::sync::Arc;

use super::*;
use crate::data::corpus::Corpus;
use crate::data::packing::Packing;
use crate::data::shard::Shard;

/// 29 documents, 4 to 12 tokens, all ids different: 35 rows of 8 or so.
fn loader(seed: u64, seq_len: usize) -> Loader {
    let documents = (0..29u32).map(|d| ((0..4 + d % 9).map(|i| 1 + 100 * d + i).collect(), 1));
    let packing = Packing {
        seq_len,
        end_of_text: 0,
        num_mtp: 1,
        cross_document_attention: false,
        refuse_long_documents: false,
        end_targets: true,
    };
    let corpus = Corpus::new([Arc::new(Shard::from_documents(documents))]);
    Loader::new(Rows::new(corpus, packing).unwrap(), seed).unwrap()
}

/// The targets of each sample.
fn samples(batches: impl IntoIterator<Item = Batch>) -> Vec<Vec<u32>> {
    batches.into_iter().flat_map(|b| b.targets.chunks(b.seq_len).map(<[u32]>::to_vec).collect::<Vec<_>>()).collect()
}

#[test]
fn an_epoch_has_every_target_once_and_each_epoch_another_order() {
    let mut loader = loader(1, 8);
    let num_rows = loader.rows().num_rows() as usize;
    let in_order = samples([loader.rows().clone().batch(0..num_rows as u64)]);
    let epochs: Vec<_> = (0..3).map(|_| samples([loader.next_batch(num_rows)])).collect();
    let sorted = |epoch: &[Vec<u32>]| {
        let mut sorted = epoch.to_vec();
        sorted.sort();
        sorted
    };
    for epoch in &epochs {
        assert_eq!(sorted(epoch), sorted(&in_order));
    }
    assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2] && epochs[0] != in_order);
}

#[test]
fn samples_do_not_depend_on_batch_size_or_ranks() {
    let total = 120; // more than three epochs
    let expected = samples([loader(7, 8).next_batch(total)]);
    for size in [1, 2, 3, 7, 40] {
        let mut loader = loader(7, 8);
        let batches = (0..total.div_ceil(size)).map(|_| loader.next_batch(size));
        assert_eq!(samples(batches.collect::<Vec<_>>())[..total], expected, "batches of {size}");
    }
    for ranks in [2, 3, 5] {
        let per_rank = 4;
        let mut parts: Vec<Loader> = (0..ranks).map(|_| loader(7, 8)).collect();
        let mut got = Vec::new();
        while got.len() < total {
            for (rank, part) in parts.iter_mut().enumerate() {
                part.skip(rank * per_rank);
                got.extend(samples([part.next_batch(per_rank)]));
                part.skip((ranks - rank - 1) * per_rank);
            }
        }
        assert_eq!(got[..total], expected, "{ranks} ranks");
    }
}

#[test]
fn a_run_resumes_at_any_sample() {
    let mut uninterrupted = loader(3, 8);
    for taken in 0..80 {
        let saved = serde_json::to_string(&uninterrupted.cursor()).unwrap();
        let mut resumed = loader(3, 8);
        resumed.seek(&serde_json::from_str(&saved).unwrap()).unwrap();
        assert_eq!(resumed.cursor(), uninterrupted.cursor());
        let batch = uninterrupted.next_batch(1);
        assert_eq!(resumed.next_batch(1), batch, "after {taken} samples");
        assert_eq!(resumed.batch_at(taken, 1), batch, "after {taken} samples");
    }
    let cursor = uninterrupted.cursor();
    assert_eq!(cursor.epoch * cursor.num_rows + cursor.sample, 80);
    assert!(cursor.epoch > 0 && cursor.sample < cursor.num_rows);
}

#[test]
fn a_cursor_of_other_data_is_refused() {
    let mut here = loader(3, 8);
    let cursor = here.cursor();
    let mut other_corpus = cursor.clone();
    other_corpus.corpus = "0123456789abcdef".to_owned();
    let cases = [
        (loader(4, 8).cursor(), "saved with seed = 4, but this run has seed = 3"),
        (loader(3, 9).cursor(), "saved with seq_len = 9, but this run has seq_len = 8"),
        (other_corpus, "saved with corpus = 0123456789abcdef, but"),
        (Cursor { num_rows: 2, ..cursor.clone() }, "saved with num_rows = 2, but"),
        (Cursor { sample: cursor.num_rows, ..cursor.clone() }, "the checkpoint is damaged"),
        (Cursor { epoch: u64::MAX, ..cursor.clone() }, "the checkpoint is damaged"),
    ];
    for (cursor, expected) in cases {
        let error = here.seek(&cursor).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    assert!(serde_json::from_str::<Cursor>("{\"epoch\":0,\"sample\":0}").is_err(), "missing fields are refused");
}
