//! Generation: what this process itself asks of a model, as requests like any other ([`crate::serve`]).

use std::sync::Arc;

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use parking_lot::Mutex;

use crate::{
    api::{GenerateReport, GenerateRequest, Progress},
    data::tokenizer::Tokenizer,
    probe::Checkpoint,
    serve::{
        Capacity, Event, Finish, FinishReason, Params, Refused, ServePlugin, Server, Service, Sink, Submission, Task,
    },
    session::SessionError,
    work::Work,
};

/// An answer as it comes.
#[derive(Clone, Default)]
pub struct Answer(Arc<Mutex<Collected>>);

/// What came.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    /// Text so far.
    pub text: String,
    /// Tokens so far, an ending one included.
    pub tokens: Vec<u32>,
    /// When each came, in nanoseconds of the clock.
    pub token_nanos: Vec<u64>,
    /// Set when it is done.
    pub finish: Option<Finish>,
    /// Mean last hidden state, if that was asked for.
    pub embedding: Vec<f32>,
    /// Why it could not be done.
    pub failure: Option<String>,
}

impl Answer {
    /// Asks; text is told to `progress` as it comes, if anyone is.
    ///
    /// # Errors
    /// If the request is refused.
    pub fn ask(
        service: &Service,
        prompt: Vec<u32>,
        task: Task,
        progress: Option<Arc<dyn Progress>>,
    ) -> Result<Answer, Refused> {
        let answer = Answer::default();
        service.submit(Submission { prompt, task, priority: 0, sink: answer.sink(progress) })?;
        Ok(answer)
    }

    /// Collects what comes.
    fn sink(&self, progress: Option<Arc<dyn Progress>>) -> Box<dyn Sink> {
        let collected = self.0.clone();
        Box::new(move |event: Event| {
            let mut collected = collected.lock();
            let mut say = |text: &str| {
                collected.text.push_str(text);
                if let Some(progress) = &progress {
                    progress.text(text);
                }
            };
            match event {
                Event::Token(token) => {
                    say(&token.text);
                    collected.tokens.push(token.id);
                    collected.token_nanos.push(kernels::clock::now_nanos());
                }
                Event::Finished(finish) => {
                    say(&finish.text);
                    collected.finish = Some(finish);
                }
                Event::Embedding(embedding, _) => collected.embedding = embedding,
                Event::Failed(why) => collected.failure = Some(why),
            }
            true
        })
    }

    /// Whether nothing more comes.
    pub fn is_done(&self) -> bool {
        let collected = self.0.lock();
        collected.finish.is_some() || collected.failure.is_some() || !collected.embedding.is_empty()
    }

    /// What came so far.
    pub fn get(&self) -> Collected {
        self.0.lock().clone()
    }
}

impl Collected {
    /// Time between tokens, in seconds.
    pub fn token_secs(&self) -> Vec<f64> {
        self.token_nanos.windows(2).map(|w| (w[1] - w[0]) as f64 * 1e-9).collect()
    }
}

/// Tokens of a prompt, at the start of a document.
///
/// # Errors
/// If it cannot be tokenized.
pub fn prompt_tokens(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, SessionError> {
    let mut tokens = vec![tokenizer.end_of_text()];
    tokens.extend(tokenizer.encode(prompt).map_err(SessionError::input)?);
    Ok(tokens)
}

/// A model that answers one request at a time, between other work.
#[derive(Resource)]
pub struct Generation {
    tokenizer: Arc<Tokenizer>,
    service: Service,
    answer: Answer,
}

impl Generation {
    /// Makes room for `capacity` tokens; `then` is whose turn it is after an answer.
    ///
    /// # Errors
    /// Those of [`Server::start`].
    pub fn add(app: &mut App, tokenizer: Arc<Tokenizer>, capacity: usize, then: Work) -> Result<(), SessionError> {
        let service = Server::start(app.world_mut(), tokenizer.clone(), Capacity::one(capacity))?;
        app.world_mut().resource_mut::<Server>().then = Some(then);
        let generation = Generation { tokenizer, service, answer: Answer::default() };
        app.insert_resource(generation).add_plugins(ServePlugin);
        Ok(())
    }

    /// Asks; an empty prompt is the start of a document.
    ///
    /// # Errors
    /// If the prompt cannot be tokenized or does not fit.
    pub fn ask(
        &mut self,
        prompt: &str,
        params: Params,
        progress: Option<Arc<dyn Progress>>,
    ) -> Result<(), SessionError> {
        let prompt = prompt_tokens(&self.tokenizer, prompt)?;
        // As long as the model can, where more is asked for.
        let room = self.service.settings().max_context_tokens.saturating_sub(prompt.len());
        let params = Params { max_tokens: params.max_tokens.min(room.max(1)), ..params };
        self.answer =
            Answer::ask(&self.service, prompt, Task::Generate(params), progress).map_err(SessionError::input)?;
        Ok(())
    }

    /// The last answer.
    pub fn answer(&self) -> Collected {
        self.answer.get()
    }
}

/// Runs `hadal generate`.
///
/// # Errors
/// If the checkpoint cannot be read, the prompt does not fit, or a step fails.
pub fn generate(request: GenerateRequest) -> Result<GenerateReport, SessionError> {
    let folder = crate::hf::read::HfFolder::open(&request.checkpoint).map_err(SessionError::input)?;
    let longest = folder.model().map_err(SessionError::input)?.config.max_position_embeddings;
    // Room for the prompt (a token is at least a byte) and what follows, and no more than the model was made for.
    let capacity = (request.prompt.len() + 2 + request.max_new_tokens).min(longest);
    let checkpoint =
        Checkpoint::load(&request.checkpoint, (request.compute, request.device), capacity, false, &request.progress)?;
    let tokenizer = Arc::new(checkpoint.tokenizer()?);
    let weights = checkpoint.weights();
    let mut app = checkpoint.app;
    Generation::add(&mut app, tokenizer, capacity, Work::Rest)?;
    let mut generation = app.world_mut().resource_mut::<Generation>();
    let params = Params {
        max_tokens: request.max_new_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        seed: request.seed,
        ignore_eos: request.ignore_eos,
        ..Params::default()
    };
    generation.ask(&request.prompt, params, Some(request.progress.clone()))?;
    let cache_bytes_per_token = generation.service.settings().cache_bytes_per_token;
    app.insert_resource(Work::Serve);
    run_to_rest(&mut app)?;
    let answer = app.world().resource::<Generation>().answer();
    let why = || SessionError::runtime(answer.failure.as_deref().unwrap_or("the model gave no answer"));
    let finish = answer.finish.clone().ok_or_else(why)?;
    let rest_secs: f64 = answer.token_secs().iter().sum();
    let ended = finish.reason == FinishReason::Stop;
    Ok(GenerateReport {
        text: answer.text,
        num_prompt_tokens: finish.num_prompt_tokens,
        first_token_secs: finish.queue_secs + finish.prefill_secs,
        tokens_per_sec: if rest_secs > 0.0 { (answer.tokens.len() - 1) as f64 / rest_secs } else { 0.0 },
        tokens: answer.tokens[..answer.tokens.len() - usize::from(ended)].to_vec(),
        cache_bytes_per_token,
        finish_reason: if ended { "stop" } else { "length" }.to_owned(),
        weights,
    })
}

/// Runs an app until it is nobody's turn.
///
/// # Errors
/// Whatever a step fails with.
pub fn run_to_rest(app: &mut App) -> Result<(), SessionError> {
    fn stop(work: Res<Work>, mut exit: ResMut<Exit>) {
        if *work == Work::Rest {
            exit.stop(ExitReason::Finished);
        }
    }
    #[derive(Resource)]
    struct StopsAtRest;
    if !app.world().contains_resource::<StopsAtRest>() {
        app.insert_resource(StopsAtRest).add_systems(Step, stop.in_set(StepSystems::Keep));
    }
    match engine::app::run(app) {
        // Whoever may ask it to stop is content with that.
        ExitReason::Finished | ExitReason::Stopped => Ok(()),
        reason => Err(SessionError::runtime(reason)),
    }
}
