//! Training a byte-level BPE, and the bytes of its tokens.

use std::collections::HashSet;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use super::tokenizer::END_OF_TEXT;

/// The `tokenizer.json` of a tokenizer trained on `documents`.
pub(super) fn train(documents: &[String], vocab_size: usize) -> tokenizers::Result<String> {
    let level = ByteLevel::new(false, false, true);
    let mut tokenizer = HfTokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(level)).with_decoder(Some(level)).with_post_processor(Some(level));
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(alphabet)
        .build();
    let mut trainer = TrainerWrapper::from(trainer);
    tokenizer.train(&mut trainer, documents.iter().flat_map(|document| pieces(document)))?;
    tokenizer.to_string(false)
}

/// The largest id that is taken for real: memory grows with it.
const MAX_ID: u32 = (1 << 24) - 1;

/// What an id stands for.
#[derive(Clone, Debug, Default)]
pub(super) struct Token {
    /// Its bytes, none for an id that is not assigned.
    pub(super) bytes: Box<[u8]>,
    /// Whether it is a special token.
    pub(super) is_special: bool,
}

/// What each id up to the largest one stands for.
pub(super) fn tokens(tokenizer: &HfTokenizer) -> Result<Vec<Token>, String> {
    let last_id = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
    if last_id > MAX_ID {
        return Err(format!("token id {last_id}, above {MAX_ID}"));
    }
    let added = tokenizer.get_added_tokens_decoder();
    let byte_of_char = byte_of_char();
    let token = |id: u32| match (added.get(&id), tokenizer.id_to_token(id)) {
        (Some(added), _) => Ok(Token { bytes: added.content.as_bytes().into(), is_special: added.special }),
        (None, Some(name)) => {
            let byte = |c: char| byte_of_char.get(c as usize).copied().flatten();
            let bytes = name.chars().map(byte).collect::<Option<_>>();
            let bytes = bytes.ok_or_else(|| format!("token {id} {name:?}, which is not in the byte alphabet"))?;
            Ok(Token { bytes, is_special: false })
        }
        (None, None) => Ok(Token::default()),
    };
    (0..=last_id).map(token).collect()
}

/// Byte-level tokenizers write each byte as one printable character: itself where it is one in Latin-1, otherwise the next
/// free character from U+0100 on (the table of GPT-2). Indexed by the character.
fn byte_of_char() -> Vec<Option<u8>> {
    let mut table = vec![None; 512];
    let mut free = 256;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[free] = Some(byte);
            free += 1;
        }
    }
    table
}

/// The document in pieces that pre-tokenize like the whole: cut between a line break and the character that follows it, where
/// neither neighbour of the break is white space. Training counts pieces in parallel and never holds offsets of a whole book.
fn pieces(document: &str) -> impl Iterator<Item = &str> {
    const PIECE_BYTES: usize = 1 << 16;
    let mut rest = document;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let cut = rest.char_indices().skip_while(|(at, _)| *at < PIECE_BYTES).find_map(|(at, c)| {
            let (before, after) = (rest[..at].chars().next_back(), rest[at + c.len_utf8()..].chars().next());
            let lone = before.is_some_and(|b| !b.is_whitespace()) && after.is_some_and(|a| !a.is_whitespace());
            (c == '\n' && lone).then_some(at + 1)
        });
        let (piece, tail) = rest.split_at(cut.unwrap_or(rest.len()));
        rest = tail;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_document_and_end_at_lone_line_breaks() {
        let line = "Call me Ishmael—never mind how long\n";
        for text in [
            line.repeat(9000),
            "\n\n x".repeat(50_000),
            "x".repeat(200_000),
            format!("{}\n\nx", line.repeat(1820)),
            String::new(),
        ] {
            let pieces: Vec<&str> = pieces(&text).collect();
            assert_eq!(pieces.concat(), text);
            for pair in pieces.windows(2) {
                assert!(
                    pair[0].ends_with('\n') && !pair[0].ends_with("\n\n") && !pair[1].starts_with(char::is_whitespace)
                );
            }
        }
        assert!(pieces(&line.repeat(9000)).count() > 4);
    }

    #[test]
    fn all_256_bytes_have_a_character() {
        let mut bytes: Vec<u8> = byte_of_char().into_iter().flatten().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of_char()['Ġ' as usize], Some(b' '));
    }
}
