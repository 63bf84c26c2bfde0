//! The held-out split: the last share of the corpus's bytes, cut before anything is tokenized, so that neither the tokenizer
//! nor the model ever sees it and its byte count is that of the text itself.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How much of the corpus validation keeps for itself, as a share of its UTF-8 bytes, above 0 and below 1.
///
/// - One document: it is cut `floor(share * bytes)` bytes before its end, earlier if that is inside a character.
/// - Several documents: whole documents, the last ones; the cut is the document boundary nearest to the share (of two
///   equally near ones the later), with at least one document on each side.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut(pub f64);

/// Why a corpus could not be split.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum SplitError {
    /// The share is not a proper fraction.
    #[error("the held-out share must be above 0 and below 1, found {0}; 0.1 holds out the last tenth")]
    Share(f64),
    /// One side would be empty.
    #[error(
        "a corpus of {num_bytes} bytes in {num_documents} documents has no part of {share} to hold out; add text or change the share"
    )]
    TooSmall {
        /// UTF-8 bytes of the corpus.
        num_bytes: u64,
        /// Documents of the corpus.
        num_documents: usize,
        /// The share asked for.
        share: f64,
    },
}

impl HeldOut {
    /// Bytes to hold out of `num_bytes`.
    fn target(self, num_bytes: u64) -> Result<u64, SplitError> {
        if !(self.0 > 0.0 && self.0 < 1.0) {
            return Err(SplitError::Share(self.0));
        }
        Ok((num_bytes as f64 * self.0).floor() as u64)
    }

    /// How many of the first documents are for training, given the bytes of each document; at least one is on each side.
    ///
    /// # Errors
    /// A share outside (0, 1), or fewer than two documents.
    pub fn split_at_document(self, document_bytes: &[u64]) -> Result<usize, SplitError> {
        let num_bytes: u64 = document_bytes.iter().sum();
        let target = self.target(num_bytes)?;
        let mut held_out = 0;
        let mut best: Option<(u64, usize)> = None;
        for first in (1..document_bytes.len()).rev() {
            held_out += document_bytes[first];
            let distance = held_out.abs_diff(target);
            if best.is_none_or(|(least, _)| distance < least) {
                best = Some((distance, first));
            }
        }
        let too_small = SplitError::TooSmall { num_bytes, num_documents: document_bytes.len(), share: self.0 };
        best.map(|(_, first)| first).ok_or(too_small)
    }

    /// Splits `documents` into those for training and those held out; neither is empty.
    ///
    /// # Errors
    /// A share outside (0, 1), or a single document too short to be cut.
    pub fn split(self, mut documents: Vec<String>) -> Result<(Vec<String>, Vec<String>), SplitError> {
        if let [text] = documents.as_mut_slice() {
            let num_bytes = text.len() as u64;
            let cut = text.floor_char_boundary(text.len() - self.target(num_bytes)? as usize);
            let held_out = text.split_off(cut);
            if text.is_empty() || held_out.is_empty() {
                return Err(SplitError::TooSmall { num_bytes, num_documents: 1, share: self.0 });
            }
            return Ok((documents, vec![held_out]));
        }
        let bytes: Vec<u64> = documents.iter().map(|document| document.len() as u64).collect();
        let held_out = documents.split_off(self.split_at_document(&bytes)?);
        Ok((documents, held_out))
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
    use super::*;

    fn split(share: f64, documents: &[&str]) -> Result<(Vec<String>, Vec<String>), SplitError> {
        HeldOut(share).split(documents.iter().map(|d| (*d).to_owned()).collect())
    }

    type Texts<'a> = &'a [&'a str];

    #[test]
    fn the_cut_is_where_the_rule_says() {
        let cases: [(f64, Texts, Texts, Texts); 10] = [
            (0.1, &["0123456789"], &["012345678"], &["9"]),
            (0.1, &["0123456789abcdefghi"], &["0123456789abcdefgh"], &["i"]), // 1.9 bytes: 1
            (0.5, &["aéb"], &["a"], &["éb"]),                                 // byte 2 is inside é: the cut moves back
            (0.25, &["ab€"], &["ab"], &["€"]),
            (0.1, &["aaaaaaaaaaaaaaaaaa", "bb"], &["aaaaaaaaaaaaaaaaaa"], &["bb"]),
            (0.1, &["a", "bbbbbbbbb"], &["a"], &["bbbbbbbbb"]), // at least one document on each side
            (0.5, &["aa", "bb", "cc", "dd"], &["aa", "bb"], &["cc", "dd"]),
            (0.5, &["aa", "bb", "cc"], &["aa", "bb"], &["cc"]), // 2 or 4 bytes for 3: equally near, the later cut
            (0.6, &["aa", "bb", "ccc", "d"], &["aa", "bb"], &["ccc", "d"]),
            (0.9, &["a", "b", "c"], &["a"], &["b", "c"]),
        ];
        for (share, documents, train, held_out) in cases {
            let (got_train, got_held_out) = split(share, documents).unwrap();
            assert_eq!((got_train, got_held_out), (owned(train), owned(held_out)), "{share} of {documents:?}");
        }
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn nothing_is_lost_at_any_share() {
        let text = "Ishmael—an Einführung in 海";
        for percent in 10..100 {
            let (train, held_out) = split(f64::from(percent) / 100.0, &[text]).unwrap();
            assert_eq!(train.concat() + &held_out.concat(), text);
        }
    }

    #[test]
    fn shares_and_corpora_that_cannot_be_split_are_refused() {
        for share in [0.0, 1.0, -0.1, 1.5, f64::NAN, f64::INFINITY] {
            assert!(matches!(split(share, &["text", "text"]), Err(SplitError::Share(_))), "{share}");
            assert!(matches!(split(share, &["text"]), Err(SplitError::Share(_))), "{share}");
        }
        for documents in [&["short"][..], &["é"], &[]] {
            assert!(matches!(split(0.1, documents), Err(SplitError::TooSmall { .. })), "{documents:?}");
        }
    }
}
