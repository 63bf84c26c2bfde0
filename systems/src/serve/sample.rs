//! From what a request asks to what is done to its row of logits: pure functions of its parameters and of the tokens so far.

use std::{collections::BTreeMap, sync::Arc};

use kernels::ops::{
    logits::{Adjust, penalties},
    sampling::Sampling,
};

use super::request::Params;

/// The tokens of a request, as penalties need them. A request without penalties keeps nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Of the prompt and of the answer, ascending, each once; if there is a repetition penalty.
    occurred: Vec<u32>,
    /// How often each token was generated, if that is penalized.
    counts: BTreeMap<u32, u32>,
}

impl History {
    /// Before the first generated token.
    pub fn new(params: &Params, prompt: &[u32]) -> Self {
        let mut occurred = if has_repetition_penalty(params) { prompt.to_vec() } else { Vec::new() };
        occurred.sort_unstable();
        occurred.dedup();
        History { occurred, counts: BTreeMap::new() }
    }

    /// Takes a generated token.
    pub fn push(&mut self, params: &Params, token: u32) {
        if has_repetition_penalty(params)
            && let Err(place) = self.occurred.binary_search(&token)
        {
            self.occurred.insert(place, token);
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
    }
}

fn has_repetition_penalty(params: &Params) -> bool {
    params.repetition_penalty != 1.0
}

/// How the token at `position` of the request's sequence is chosen: the same in any batch, and again after a preemption.
pub fn sampling(params: &Params, position: usize) -> Sampling {
    let &Params { temperature, top_k, top_p, min_p, seed, .. } = params;
    Sampling { temperature, top_k, top_p, min_p, seed, position: position as u64 }
}

/// What is changed in its logits before; `allowed` is what its grammar allows, a bit for each token.
pub fn adjust(params: &Params, history: &History, allowed: Option<Arc<[u32]>>) -> Adjust {
    let counts = history.counts.iter().map(|(&token, &count)| (token, count));
    Adjust {
        bias: params.logit_bias.as_slice().into(),
        repetition_penalty: params.repetition_penalty,
        occurred: history.occurred.as_slice().into(),
        additions: penalties(counts, params.presence_penalty, params.frequency_penalty).into(),
        allowed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(params: &Params, prompt: &[u32], generated: &[u32]) -> History {
        let mut history = History::new(params, prompt);
        generated.iter().for_each(|&token| history.push(params, token));
        history
    }

    #[test]
    fn a_plain_request_changes_nothing_and_keeps_nothing() {
        let params = Params::default();
        let history = history(&params, &[5, 3], &[1, 1]);
        assert_eq!(history, History::default());
        assert!(adjust(&params, &history, None).is_none());
        let wanted = Sampling { temperature: 1.0, position: 17, ..Sampling::GREEDY };
        assert_eq!(sampling(&params, 17), wanted);
    }

    #[test]
    fn what_is_asked_for_arrives() {
        let params = Params {
            temperature: 0.3,
            top_k: 4,
            top_p: 0.8,
            min_p: 0.05,
            seed: 11,
            repetition_penalty: 1.2,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(7, -100.0), (2, 1.5)],
            ..Params::default()
        };
        let wanted = Sampling { temperature: 0.3, top_k: 4, top_p: 0.8, min_p: 0.05, seed: 11, position: 2 };
        assert_eq!(sampling(&params, 2), wanted);
        let wanted = Adjust {
            bias: [(7, -100.0), (2, 1.5)].into(),
            repetition_penalty: 1.2,
            // Prompt and answer, once each.
            occurred: [1, 3, 5, 8].into(),
            // The answer only: once 1, twice 8.
            additions: [(1, -0.75), (8, -1.0)].into(),
            allowed: Some([6].into()),
        };
        let history = history(&params, &[5, 3, 5], &[8, 1, 8]);
        assert_eq!(adjust(&params, &history, Some([6].into())), wanted);
    }

    #[test]
    fn each_penalty_keeps_what_it_needs_only() {
        let frequency = Params { frequency_penalty: -0.5, ..Params::default() };
        let history_of = history(&frequency, &[9], &[4, 4]);
        assert_eq!(history_of, History { occurred: vec![], counts: [(4, 2)].into() });
        assert_eq!(adjust(&frequency, &history_of, None).additions[..], [(4, 1.0)]);
        let repetition = Params { repetition_penalty: 0.5, ..Params::default() };
        assert_eq!(history(&repetition, &[9], &[4, 4]), History { occurred: vec![4, 9], counts: BTreeMap::new() });
    }
}
