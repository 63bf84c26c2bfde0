//! A tokenized corpus: the documents of one or more shards in order, or a range of them. It is what packing reads.

use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::shard::Shard;

/// Documents as token ids, in corpus order; cheap to clone, the tokens stay where they are.
#[derive(Clone, Debug, Default)]
pub struct Corpus {
    parts: Vec<Part>,
}

/// Consecutive documents of one shard.
#[derive(Clone, Debug)]
struct Part {
    shard: Arc<Shard>,
    documents: Range<usize>,
    /// Index in the corpus of the part's first document.
    first: usize,
}

impl Corpus {
    /// The documents of `shards`, one shard after the other.
    pub fn new(shards: impl IntoIterator<Item = Arc<Shard>>) -> Corpus {
        let mut corpus = Corpus::default();
        for shard in shards {
            let documents = 0..shard.num_documents();
            corpus.push(shard, documents);
        }
        corpus
    }

    fn push(&mut self, shard: Arc<Shard>, documents: Range<usize>) {
        if !documents.is_empty() {
            let first = self.num_documents();
            self.parts.push(Part { shard, documents, first });
        }
    }

    /// The first `num_documents` documents, and the others.
    pub fn split_at(&self, num_documents: usize) -> (Corpus, Corpus) {
        let (mut head, mut tail) = (Corpus::default(), Corpus::default());
        for part in &self.parts {
            let num_head = num_documents.saturating_sub(part.first).min(part.documents.len());
            let cut = part.documents.start + num_head;
            head.push(part.shard.clone(), part.documents.start..cut);
            tail.push(part.shard.clone(), cut..part.documents.end);
        }
        (head, tail)
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.parts.last().map_or(0, |part| part.first + part.documents.len())
    }

    /// Number of tokens of all documents, separators not counted.
    pub fn num_tokens(&self) -> u64 {
        (0..self.num_documents()).map(|document| self.document_tokens(document)).sum()
    }

    /// UTF-8 bytes of all documents.
    pub fn num_bytes(&self) -> u64 {
        (0..self.num_documents()).map(|document| self.document_bytes(document)).sum()
    }

    /// Number of tokens of one document.
    pub fn document_tokens(&self, document: usize) -> u64 {
        let (shard, local) = self.locate(document);
        shard.document_tokens(local)
    }

    /// UTF-8 bytes of one document.
    pub fn document_bytes(&self, document: usize) -> u64 {
        let (shard, local) = self.locate(document);
        shard.document_bytes(local)
    }

    /// Appends the tokens `range` of a document to `out`; panics when the range is outside of it.
    pub fn read(&self, document: usize, range: Range<u64>, out: &mut Vec<u32>) {
        let (shard, local) = self.locate(document);
        shard.read(local, range, out);
    }

    /// Sixteen hexadecimal digits that differ between corpora: of what the shards were made from, and which documents of them
    /// are meant. The tokens are not read.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for Part { shard, documents, .. } in &self.parts {
            hash.update(shard.origin().source);
            hash.update(shard.origin().tokenizer);
            for number in [shard.num_tokens(), documents.start as u64, documents.end as u64] {
                hash.update(number.to_le_bytes());
            }
        }
        hex(&hash.finalize()[..8])
    }

    fn locate(&self, document: usize) -> (&Shard, usize) {
        let part = &self.parts[self.parts.partition_point(|part| part.first <= document) - 1];
        (&part.shard, part.documents.start + document - part.first)
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(corpus: &Corpus) -> Vec<Vec<u32>> {
        let read = |document| {
            let mut tokens = Vec::new();
            corpus.read(document, 0..corpus.document_tokens(document), &mut tokens);
            tokens
        };
        (0..corpus.num_documents()).map(read).collect()
    }

    #[test]
    fn documents_of_all_shards_in_order_and_split_anywhere() {
        let shards: [&[&[u32]]; 4] = [&[&[1, 2], &[3]], &[], &[&[]], &[&[4], &[5, 6, 7], &[8]]];
        let shard = |documents: &[&[u32]]| {
            Arc::new(Shard::from_documents(documents.iter().map(|d| (d.to_vec(), 10 + d.len() as u64))))
        };
        let corpus = Corpus::new(shards.map(shard));
        let all: Vec<Vec<u32>> = shards.concat().iter().map(|document| document.to_vec()).collect();
        assert_eq!(documents(&corpus), all);
        assert_eq!((corpus.num_tokens(), corpus.num_bytes()), (8, 68));
        for cut in 0..=all.len() + 1 {
            let (head, tail) = corpus.split_at(cut);
            assert_eq!(documents(&head), all[..cut.min(all.len())], "cut at {cut}");
            assert_eq!(documents(&tail), all[cut.min(all.len())..], "cut at {cut}");
            assert_eq!(head.digest() == corpus.digest(), cut >= all.len(), "cut at {cut}");
            for (tail_cut, rest) in [(1, all.len().saturating_sub(cut + 1)), (0, all.len().saturating_sub(cut))] {
                assert_eq!(tail.split_at(tail_cut).1.num_documents(), rest);
            }
        }
    }
}
