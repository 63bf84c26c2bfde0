//! Many prompts from one caller: all put to a model, as fast as it takes them, and answered in their order.

use std::{collections::VecDeque, time::Duration};

use super::{Params, Task, host::Host};
use crate::{
    generate::{Answer, Collected, prompt_tokens},
    session::SessionError,
};

/// Asks `prompts`, and calls `each` with every prompt's number and answer, in order. Prompt i has seed `params.seed + i`.
///
/// # Errors
/// If a prompt cannot be tokenized or is too long, the model fails, or `each` does.
pub fn run(
    host: &Host,
    prompts: &[String],
    params: &Params,
    mut each: impl FnMut(usize, Collected) -> Result<(), SessionError>,
) -> Result<(), SessionError> {
    let settings = host.service.settings();
    let (mut asked, mut next, mut done) = (VecDeque::new(), 0, 0);
    while done < prompts.len() {
        // No more than can wait, so that none is refused.
        while next < prompts.len() && asked.len() < settings.max_queued {
            let tokens = prompt_tokens(&host.tokenizer, &prompts[next])?;
            let room = settings.max_context_tokens.saturating_sub(tokens.len()).max(1);
            let seed = params.seed.wrapping_add(next as u64);
            let task = Task::Generate(Params { max_tokens: params.max_tokens.min(room), seed, ..params.clone() });
            let answer = Answer::ask(&host.service, tokens, task, None);
            asked.push_back(answer.map_err(|e| SessionError::input(format!("prompt {}: {e}", next + 1)))?);
            next += 1;
        }
        while asked.front().is_some_and(Answer::is_done) {
            let Some(answer) = asked.pop_front() else { break };
            let answer = answer.get();
            if let Some(failure) = &answer.failure {
                return Err(SessionError::runtime(format!("prompt {}: {failure}", done + 1)));
            }
            each(done, answer)?;
            done += 1;
        }
        if host.has_ended() && done < prompts.len() {
            return Err(SessionError::runtime("the model ended before all prompts were answered"));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}
