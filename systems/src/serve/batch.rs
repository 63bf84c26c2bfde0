//! Many prompts from one caller: all put to a model, as fast as it takes them, and answered in their order.

use std::{collections::VecDeque, time::Duration};

use super::{Params, Refused, Submission, Task, host::Host};
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
    let longest = host.service.settings().max_context_tokens;
    let (mut asked, mut next, mut done) = (VecDeque::new(), 0, 0);
    while done < prompts.len() {
        while next < prompts.len() {
            let tokens = prompt_tokens(&host.tokenizer, &prompts[next])?;
            let room = longest.saturating_sub(tokens.len()).max(1);
            let seed = params.seed.wrapping_add(next as u64);
            let task = Task::Generate(Params { max_tokens: params.max_tokens.min(room), seed, ..params.clone() });
            match submit(host, tokens, task) {
                Ok(answer) => asked.push_back(answer),
                Err(Refused::QueueFull { .. }) => break,
                Err(refused) => return Err(SessionError::input(format!("prompt {}: {refused}", next + 1))),
            }
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

fn submit(host: &Host, prompt: Vec<u32>, task: Task) -> Result<Answer, Refused> {
    let answer = Answer::default();
    host.service.submit(Submission { prompt, task, priority: 0, sink: answer.sink(None) })?;
    Ok(answer)
}
