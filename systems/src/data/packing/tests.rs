//! Rows written out by hand, and properties of rows of every shape.

#![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
use std::sync::Arc;

use super::*;
use crate::data::shard::Shard;

const E: u32 = 0;
const X: u32 = IGNORE;
const PACKING: Packing = Packing {
    seq_len: 4,
    end_of_text: E,
    num_mtp: 1,
    cross_document_attention: false,
    refuse_long_documents: false,
    end_targets: true,
};

fn rows(documents: &[&[u32]], packing: Packing) -> Result<Rows, PackingError> {
    let shard = Shard::from_documents(documents.iter().map(|d| (d.to_vec(), d.len() as u64)));
    Rows::new(Corpus::new([Arc::new(shard)]), packing)
}

/// Stream: E 1 2 | E 3 4 5 6 7 8 | E | E 9 | E, in rows of 4.
const DOCUMENTS: &[&[u32]] = &[&[1, 2], &[3, 4, 5, 6, 7, 8], &[], &[9]];

#[test]
fn rows_of_packed_documents() {
    let rows = rows(DOCUMENTS, PACKING).unwrap();
    assert_eq!((rows.num_positions(), rows.num_rows()), (13, 4));
    let batch = rows.batch(0..4);
    assert_eq!((batch.num_sequences, batch.seq_len), (4, 4));
    assert_eq!(batch.tokens, [E, 1, 2, E, /**/ 3, 4, 5, 6, /**/ 7, 8, E, E, /**/ 9, E, E, E]);
    assert_eq!(batch.targets, [1, 2, E, 3, /**/ 4, 5, 6, 7, /**/ 8, E, E, 9, /**/ E, X, X, X]);
    assert_eq!(batch.mtp_targets(1), [2, E, X, 4, /**/ 5, 6, 7, 8, /**/ E, X, X, E, /**/ X, X, X, X]);
    assert_eq!(batch.mtp_inputs(1), [1, 2, E, 3, /**/ 4, 5, 6, 7, /**/ 8, E, E, 9, /**/ E, E, E, E]);
    assert_eq!(batch.positions, [0, 1, 2, 0, /**/ 0, 1, 2, 3, /**/ 0, 1, 0, 0, /**/ 0, 0, 1, 2]);
    assert_eq!(batch.doc_offsets, [0, 3, 4, 8, 10, 11, 12, 13, 16]);
    assert_eq!(batch.num_targets(), 13);
}

#[test]
fn cross_document_attention_makes_a_row_one_span() {
    let packing = Packing { cross_document_attention: true, ..PACKING };
    let batch = rows(DOCUMENTS, packing).unwrap().batch(0..4);
    let isolated = rows(DOCUMENTS, PACKING).unwrap().batch(0..4);
    assert_eq!((&batch.tokens, &batch.targets), (&isolated.tokens, &isolated.targets));
    assert_eq!(batch.mtp_targets(1), [2, E, 3, 4, /**/ 5, 6, 7, 8, /**/ E, E, 9, E, /**/ X, X, X, X]);
    assert_eq!(batch.positions, [0, 1, 2, 3, /**/ 0, 1, 2, 3, /**/ 0, 1, 2, 3, /**/ 0, 0, 1, 2]);
    assert_eq!(batch.doc_offsets, [0, 4, 8, 12, 13, 16]);
}

#[test]
fn ends_of_documents_need_not_be_targets() {
    for cross_document_attention in [false, true] {
        let packing = Packing { end_targets: false, cross_document_attention, ..PACKING };
        let batch = rows(DOCUMENTS, packing).unwrap().batch(0..4);
        assert_eq!(batch.targets, [1, 2, X, 3, /**/ 4, 5, 6, 7, /**/ 8, X, X, 9, /**/ X, X, X, X]);
    }
}

#[test]
fn rows_come_in_any_order_and_past_the_end_as_padding() {
    let rows = rows(DOCUMENTS, PACKING).unwrap();
    let all = rows.batch(0..4);
    let batch = rows.batch([2, 0, 9, u64::MAX]);
    assert_eq!(batch.tokens[..4], all.tokens[8..12]);
    assert_eq!(batch.mtp_targets(1)[4..8], all.mtp_targets(1)[..4]);
    assert_eq!(batch.tokens[8..], [E; 8]);
    assert_eq!(batch.targets[8..], [X; 8]);
    assert_eq!(batch.doc_offsets, [0, 2, 3, 4, 7, 8, 12, 16]);
}

#[test]
fn every_token_is_a_target_once_whatever_the_shape() {
    let documents: Vec<Vec<u32>> = (0..40u32).map(|d| (0..(d * 7) % 23).map(|i| 1 + d * 100 + i).collect()).collect();
    let borrowed: Vec<&[u32]> = documents.iter().map(Vec::as_slice).collect();
    let expected: Vec<u32> = documents.iter().flat_map(|document| document.iter().copied().chain([E])).collect();
    for seq_len in [1, 2, 3, 7, 16, 1000] {
        for num_mtp in 0..3 {
            let rows = rows(&borrowed, Packing { seq_len, num_mtp, ..PACKING }).unwrap();
            let batch = rows.batch(0..rows.num_rows());
            let targets: Vec<u32> = batch.targets.iter().copied().filter(|target| *target != X).collect();
            assert_eq!(targets, expected, "seq_len {seq_len}");
            check_spans(&batch);
            for depth in 1..=num_mtp {
                // All but the first `depth` targets of each document.
                let targets: Vec<u32> =
                    batch.mtp_targets(depth).iter().copied().filter(|target| *target != X).collect();
                let expected: Vec<u32> =
                    documents.iter().flat_map(|document| document.iter().copied().chain([E]).skip(depth)).collect();
                assert_eq!(targets, expected, "seq_len {seq_len}, depth {depth}");
            }
        }
    }
}

/// Spans cover the batch, start with each row, and positions count from 0 in each.
fn check_spans(batch: &Batch) {
    let offsets = &batch.doc_offsets;
    assert_eq!((offsets[0], offsets[offsets.len() - 1] as usize), (0, batch.tokens.len()));
    assert!(offsets.is_sorted_by(|a, b| a < b), "an empty span");
    for row in 0..batch.num_sequences {
        assert!(offsets.contains(&((row * batch.seq_len) as u32)), "row {row} starts no span");
    }
    for span in offsets.windows(2) {
        let positions = &batch.positions[span[0] as usize..span[1] as usize];
        assert!(positions.iter().copied().eq(0..span[1] - span[0]), "positions {positions:?}");
    }
    for (at, token) in batch.tokens.iter().enumerate().filter(|(at, _)| batch.targets[*at] != X) {
        assert!(*token != E || offsets.contains(&(at as u32)), "a document starts inside of a span");
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let refuse = Packing { refuse_long_documents: true, ..PACKING };
    assert!(rows(&[&[1, 2, 3], &[4]], refuse).is_ok());
    let error = rows(&[&[1], &[1, 2, 3, 4]], refuse).unwrap_err();
    assert_eq!(error, PackingError::LongDocument { document: 1, tokens: 4, seq_len: 4 });
    assert_eq!(rows(&[], PACKING).unwrap_err(), PackingError::Empty);
    assert_eq!(rows(&[&[], &[]], PACKING).unwrap_err(), PackingError::Empty);
    assert_eq!(rows(&[&[1]], Packing { seq_len: 0, ..PACKING }).unwrap_err(), PackingError::NoPositions);
}
