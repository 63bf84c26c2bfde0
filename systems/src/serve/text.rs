//! The text of an answer as its tokens come: what is certain is given out, what may still become a stop text is held back.
//!
//! A token may end in the middle of a character, and a stop text in the middle of a token. So tokens go through a
//! [`DecodeStream`], which gives out whole characters, and their bytes through one matcher for each stop text (Knuth, Morris and
//! Pratt: the longest beginning of the stop text that the text ends with). What no matcher is in the middle of is certain.
//!
//! An answer ends with the stop text that is complete first, wherever tokens begin and end; of those that are complete at the same
//! byte, with the longest. Each byte is looked at once, whatever the stop texts are.

use std::sync::Arc;

use crate::data::tokenizer::{DecodeStream, Tokenizer};

/// A part of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that is certain, after what came before; may be empty.
    pub text: String,
    /// Whether a stop text is complete. It is not part of `text`, and nothing comes after it.
    pub is_stopped: bool,
}

/// Turns the tokens of one answer into its text.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    stream: DecodeStream<Arc<Tokenizer>>,
    stops: Vec<Matcher>,
    /// What was decoded and not given out.
    held: String,
    is_stopped: bool,
}

impl Detokenizer {
    /// Before the first token. Special tokens have no text; an empty stop text is none.
    pub fn new(tokenizer: Arc<Tokenizer>, stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| Matcher::new(stop)).collect();
        Detokenizer { stream: DecodeStream::new(tokenizer, true), stops, held: String::new(), is_stopped: false }
    }

    /// Takes a token.
    pub fn push(&mut self, id: u32) -> Piece {
        let decoded = self.stream.push(id);
        self.take(&decoded)
    }

    /// The end of the answer: gives out what was held back, with U+FFFD for a character that is not whole.
    pub fn finish(&mut self) -> Piece {
        let decoded = self.stream.finish();
        let mut piece = self.take(&decoded);
        piece.text += &std::mem::take(&mut self.held);
        self.stops.clear();
        piece
    }

    fn take(&mut self, decoded: &str) -> Piece {
        if self.is_stopped {
            return Piece { text: String::new(), is_stopped: true };
        }
        let before = self.held.len();
        self.held += decoded;
        for (at, byte) in decoded.bytes().enumerate() {
            self.stops.iter_mut().for_each(|stop| stop.push(byte));
            let complete = self.stops.iter().filter(|stop| stop.is_complete()).map(|stop| stop.matched).max();
            if let Some(len) = complete {
                self.held.truncate(before + at + 1 - len);
                self.is_stopped = true;
                return Piece { text: std::mem::take(&mut self.held), is_stopped: true };
            }
        }
        let uncertain = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - uncertain).collect();
        Piece { text, is_stopped: false }
    }
}

/// Finds one stop text.
#[derive(Clone, Debug)]
struct Matcher {
    stop: Box<[u8]>,
    /// For each beginning of the stop text, the length of the longest shorter one that it ends with.
    shorter: Box<[usize]>,
    /// How much of the stop text the text ends with.
    matched: usize,
}

impl Matcher {
    fn new(stop: &str) -> Self {
        let stop: Box<[u8]> = stop.as_bytes().into();
        let mut shorter = vec![0; stop.len()];
        for i in 1..stop.len() {
            shorter[i] = longer(&stop, &shorter, shorter[i - 1], stop[i]);
        }
        Matcher { stop, shorter: shorter.into(), matched: 0 }
    }

    fn push(&mut self, byte: u8) {
        self.matched = longer(&self.stop, &self.shorter, self.matched, byte);
    }

    fn is_complete(&self) -> bool {
        self.matched == self.stop.len()
    }
}

/// The longest beginning of `stop` that a text ends with after `byte`, if before it that was one of `matched` bytes.
fn longer(stop: &[u8], shorter: &[usize], mut matched: usize, byte: u8) -> usize {
    while matched > 0 && stop[matched] != byte {
        matched = shorter[matched - 1];
    }
    matched + usize::from(stop[matched] == byte)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use rand::{RngExt as _, SeedableRng};

    use super::*;

    fn tokenizer() -> Arc<Tokenizer> {
        let text = "ababab abcabc naïve café 海🐋 海🐋 ###\n###\n aaaa aaaa\n\nUser: \n\nUser: ".repeat(9);
        Arc::new(Tokenizer::train(&[text], 330).unwrap())
    }

    fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32], stops: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut text = Detokenizer::new(tokenizer.clone(), &stops);
        let mut all: Vec<Piece> = ids.iter().map(|&id| text.push(id)).collect();
        all.push(text.finish());
        let stopped = all.iter().position(|piece| piece.is_stopped);
        assert!(all[stopped.unwrap_or(all.len())..].iter().all(|piece| piece.is_stopped));
        assert_eq!(text.finish(), Piece { text: String::new(), is_stopped: stopped.is_some() }, "it ends once");
        (all.into_iter().map(|piece| piece.text).collect(), stopped.is_some())
    }

    /// The text before the stop text that is complete first, the longest of several.
    fn cut<'t>(text: &'t str, stops: &[&str]) -> Option<&'t str> {
        (0..=text.len()).find_map(|end| {
            let ending =
                stops.iter().filter(|stop| !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes()));
            ending.map(|stop| &text[..end - stop.len()]).min_by_key(|before| before.len())
        })
    }

    #[test]
    fn the_pieces_are_the_text_up_to_the_first_stop() {
        let tokenizer = tokenizer();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let pool = [
            "ab",
            "abab",
            "b",
            "abc",
            "aaa",
            "aaaab",
            "aab",
            "海",
            "🐋 海",
            "\u{FFFD}",
            "\n\nUser:",
            "###",
            "",
            "é",
            " ",
            "zzz",
            "naïve c",
            "ababac",
            "\u{FFFD}\u{FFFD}a",
        ];
        let likely = tokenizer.encode("abababcabcaaaaab naïve café 海🐋 海🐋 ###\n\n\nUser: ").unwrap();
        let (mut num_stopped, mut num_whole) = (0, 0);
        for round in 0..4000 {
            let len = rng.random_range(0..40);
            // Some rounds of any bytes, which break characters off, others of texts in which stop texts are likely.
            let ids: Vec<u32> = (0..len)
                .map(|_| match round % 3 {
                    0 => rng.random_range(0..tokenizer.vocab_size() as u32 + 2),
                    1 => likely[rng.random_range(0..likely.len())],
                    _ => tokenizer.encode(["a", "b", "c"][rng.random_range(0..3)]).unwrap()[0],
                })
                .collect();
            let stops: Vec<&str> = (0..rng.random_range(0..4)).map(|_| pool[rng.random_range(0..pool.len())]).collect();
            let whole = tokenizer.decode(&ids, true);
            let want = cut(&whole, &stops);
            let (got, is_stopped) = pieces(&tokenizer, &ids, &stops);
            assert_eq!(got.concat(), want.unwrap_or(&whole), "{ids:?} {stops:?}");
            assert_eq!(is_stopped, want.is_some(), "{ids:?} {stops:?}");
            if is_stopped { num_stopped += 1 } else { num_whole += 1 }
        }
        assert!(num_stopped > 500 && num_whole > 500, "{num_stopped} stopped, {num_whole} did not");
    }

    #[test]
    fn what_may_become_a_stop_text_is_held_back_and_no_more() {
        let tokenizer = Arc::new(Tokenizer::train(&["x".to_owned()], 257).unwrap());
        let by_byte = |text: &str, stops: &[&str]| pieces(&tokenizer, &tokenizer.encode(text).unwrap(), stops);
        assert_eq!(by_byte("aéb", &[]), (["a", "", "é", "b", ""].map(String::from).into(), false));
        assert_eq!(by_byte("a##b#", &["###"]), (["a", "", "", "##b", "", "#"].map(String::from).into(), false));
        assert_eq!(by_byte("a###b", &["###"]), (["a", "", "", "", "", ""].map(String::from).into(), true));
        // Of "abab" only "ab" may still become "abac".
        assert_eq!(by_byte("ababac", &["abac"]), (["", "", "", "ab", "", "", ""].map(String::from).into(), true));
        assert_eq!(by_byte("ababx", &["abac"]), (["", "", "", "ab", "abx", ""].map(String::from).into(), false));
    }

    #[test]
    fn special_tokens_have_no_text() {
        let tokenizer = tokenizer();
        let ids = [tokenizer.encode("ab").unwrap(), vec![tokenizer.end_of_text()]].concat();
        assert_eq!(pieces(&tokenizer, &ids, &["<|endoftext|>"]).0.concat(), "ab");
    }
}
