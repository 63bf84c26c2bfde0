//! Chunks: the pieces of a layer's passes that an overlapped pair is interleaved by.
//!
//! While a forward and a backward share a rank, the transfers of one are to run beside the products of the other. Which chunk
//! is launched after which is data: [`ORDER`] is the order that DeepSeek's published trace of a training step shows for every
//! layer, and a scene may give another.

use std::{fmt, str::FromStr};

/// A part of a layer's forward, input gradient or weight gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Chunk {
    /// Attention, and the router's choice.
    AttentionF,
    /// Tokens go to their experts' ranks.
    DispatchF,
    /// Experts, or the dense feed-forward half.
    MlpF,
    /// Experts' outputs come back.
    CombineF,
    /// Gradients of the outputs go to the experts' ranks.
    CombineB,
    /// Input gradient of the experts.
    MlpB,
    /// Gradients of the tokens come back.
    DispatchB,
    /// Input gradient of router and attention.
    AttentionB,
    /// Weight gradient of the experts.
    MlpW,
    /// Weight gradient of router and attention.
    AttentionW,
}

use Chunk::{AttentionB, AttentionF, AttentionW, CombineB, CombineF, DispatchB, DispatchF, MlpB, MlpF, MlpW};

/// Launch order of an overlapped pair, per layer, as in DeepSeek's profile of a training step (profile-data, train.json).
pub const ORDER: [Chunk; 10] =
    [CombineB, AttentionF, MlpB, DispatchF, DispatchB, MlpW, MlpF, AttentionB, AttentionW, CombineF];

impl Chunk {
    /// Name in scenes.
    pub const fn name(self) -> &'static str {
        match self {
            AttentionF => "attn(F)",
            DispatchF => "dispatch(F)",
            MlpF => "mlp(F)",
            CombineF => "combine(F)",
            CombineB => "combine(B)",
            MlpB => "mlp(B)",
            DispatchB => "dispatch(B)",
            AttentionB => "attn(B)",
            MlpW => "mlp(W)",
            AttentionW => "attn(W)",
        }
    }
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that is no chunk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected one of {}, found `{found}`", ORDER.map(Chunk::name).join(", "))]
pub struct ParseChunkError {
    found: String,
}

impl FromStr for Chunk {
    type Err = ParseChunkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = ORDER.into_iter().find(|chunk| chunk.name() == text.replace(' ', ""));
        found.ok_or_else(|| ParseChunkError { found: text.to_owned() })
    }
}

/// An order of all chunks from their names; each must occur once.
///
/// # Errors
/// Every unknown, missing and repeated name.
pub fn parse_order(names: &[String]) -> Result<[Chunk; 10], Vec<String>> {
    let mut problems = Vec::new();
    let mut order = Vec::new();
    for name in names {
        match name.parse::<Chunk>() {
            Err(error) => problems.push(error.to_string()),
            Ok(chunk) if order.contains(&chunk) => problems.push(format!("`{chunk}` occurs twice")),
            Ok(chunk) => order.push(chunk),
        }
    }
    for chunk in ORDER.iter().filter(|chunk| !order.contains(chunk)) {
        problems.push(format!("`{chunk}` is missing"));
    }
    if problems.is_empty() { order.try_into().map_err(|_| problems) } else { Err(problems) }
}

/// Which of two lists the next item is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The forward.
    Forward,
    /// The backward.
    Backward,
}

/// Merges the chunks of a forward and a backward: over and over, each chunk of `order` that stands next in its list is taken.
/// What is no chunk (the ends of the model, receives and sends) goes as soon as it stands next.
pub fn interleave(forward: &[Option<Chunk>], backward: &[Option<Chunk>], order: &[Chunk]) -> Vec<Side> {
    let mut merged = Vec::with_capacity(forward.len() + backward.len());
    let (mut f, mut b) = (0, 0);
    let free = |f: &mut usize, b: &mut usize, merged: &mut Vec<Side>| {
        while backward.get(*b) == Some(&None) {
            merged.push(Side::Backward);
            *b += 1;
        }
        while forward.get(*f) == Some(&None) {
            merged.push(Side::Forward);
            *f += 1;
        }
    };
    free(&mut f, &mut b, &mut merged);
    while f < forward.len() || b < backward.len() {
        let before = merged.len();
        for &chunk in order {
            if forward.get(f) == Some(&Some(chunk)) {
                merged.push(Side::Forward);
                f += 1;
            } else if backward.get(b) == Some(&Some(chunk)) {
                merged.push(Side::Backward);
                b += 1;
            }
            free(&mut f, &mut b, &mut merged);
        }
        // An order that lacks a chunk still ends.
        if merged.len() == before {
            merged.extend((f..forward.len()).map(|_| Side::Forward));
            merged.extend((b..backward.len()).map(|_| Side::Backward));
            break;
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn run(forward: &[Option<Chunk>], backward: &[Option<Chunk>]) -> String {
        let (mut f, mut b) = (forward.iter(), backward.iter());
        let name = |chunk: Option<&Option<Chunk>>| chunk.unwrap().map_or("-".to_owned(), |chunk| chunk.to_string());
        let next = |side| match side {
            Side::Forward => name(f.next()),
            Side::Backward => name(b.next()),
        };
        interleave(forward, backward, &ORDER).into_iter().map(next).collect::<Vec<_>>().join(" ")
    }

    const F: [Option<Chunk>; 4] = [Some(AttentionF), Some(DispatchF), Some(MlpF), Some(CombineF)];
    const B: [Option<Chunk>; 6] =
        [Some(CombineB), Some(MlpB), Some(DispatchB), Some(MlpW), Some(AttentionB), Some(AttentionW)];

    #[test]
    fn a_layer_of_each_follows_the_published_order() {
        assert_eq!(run(&F, &B), ORDER.map(Chunk::name).join(" "));
        let twice = |list: &[Option<Chunk>]| [list, list].concat();
        assert_eq!(run(&twice(&F), &twice(&B)), [ORDER.map(Chunk::name).join(" ").as_str(); 2].join(" "));
    }

    #[test]
    fn ends_and_dense_layers_fit_in() {
        let forward = [&[None, Some(AttentionF), Some(MlpF)], &F[..], &[None]].concat();
        let backward = [&[None], &B[..], &[Some(MlpB), Some(MlpW), Some(AttentionB), Some(AttentionW), None]].concat();
        assert_eq!(
            run(&forward, &backward),
            "- - combine(B) attn(F) mlp(B) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) attn(F) mlp(B) dispatch(F) mlp(W) \
             mlp(F) attn(B) attn(W) - combine(F) -"
        );
    }

    #[test]
    fn an_order_names_each_chunk_once() {
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let all = names(&ORDER.map(Chunk::name));
        assert_eq!(parse_order(&all).unwrap(), ORDER);
        let mut bad = all;
        (bad[0], bad[1]) = ("attn(F)".into(), "attn(G)".into());
        let problems = parse_order(&bad).unwrap_err();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("found `attn(G)`") && problems[1] == "`combine(B)` is missing");
    }
}
