//! What all requests share, and the way from a checked request to the model and back.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
};
use kernels::clock::now_nanos;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::{Stream, StreamExt};

use super::{
    config::{HttpConfig, Loaded},
    error::{ApiError, ApiResult},
    fields::Fields,
    metrics::{Metrics, Timer},
    sampling::Prompt,
};
use crate::serve::{Event, Finish, FinishReason, Submission, Task, Ticket, Token};

/// What all requests share.
pub(super) struct App {
    pub(super) config: HttpConfig,
    pub(super) model: watch::Receiver<Option<Arc<Loaded>>>,
    pub(super) metrics: Arc<Metrics>,
    /// True when what still runs is to end.
    pub(super) cut: watch::Receiver<bool>,
}

impl App {
    /// The model, if it is there.
    pub(super) fn loaded(&self) -> ApiResult<Arc<Loaded>> {
        let loaded = self.model.borrow().clone();
        let message = || format!("the model `{}` is being loaded; try again in a moment", self.config.model_name);
        loaded.ok_or_else(|| ApiError::unavailable("model_loading", message()))
    }

    /// Refuses a request for another model. One that names none means this one.
    pub(super) fn check_model(&self, name: Option<&str>) -> ApiResult<()> {
        let own = &self.config.model_name;
        match name {
            Some(name) if name != own => {
                let message = format!("there is no model `{name}` here; this server has `{own}`");
                Err(ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message))
            }
            _ => Ok(()),
        }
    }

    /// The fields of a request for this model, and the model.
    pub(super) async fn open(&self, headers: &HeaderMap, body: Body) -> ApiResult<(Fields, Arc<Loaded>)> {
        let mut fields = Fields::read(headers, body, self.config.max_body_bytes).await?;
        let loaded = self.loaded()?;
        self.check_model(fields.text("model")?.as_deref())?;
        Ok((fields, loaded))
    }

    /// Returns when a request must end, with what to say.
    pub(super) fn limit(&self, deadline: Instant) -> impl Future<Output = ApiError> + Send + use<> {
        let (mut cut, timeout) = (self.cut.clone(), self.config.request_timeout);
        async move {
            let expired = tokio::time::sleep_until(deadline);
            tokio::select! {
                () = expired => {
                    let message = format!("the answer took longer than {} s, the server's limit", timeout.as_secs_f64());
                    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
                }
                _ = cut.wait_for(|&is_cut| is_cut) => {
                    ApiError::unavailable("shutting_down", "the server ended before the answer did")
                }
            }
        }
    }

    /// Hands a prompt to the model.
    pub(super) fn submit(&self, loaded: &Loaded, prompt: Vec<u32>, task: Task, priority: i32) -> ApiResult<Generation> {
        let num_events = match &task {
            Task::Generate(params) => params.max_tokens,
            Task::Embed => 0,
        };
        // Room for all that can come: a client that reads slowly costs memory of its own answer, and nobody's time.
        let room = num_events.min(loaded.service.settings().max_context_tokens) + 2;
        let (sender, events) = mpsc::channel(room);
        let mut timer = Timer::new(self.metrics.clone(), now_nanos());
        let sink = move |event: Event| {
            timer.see(&event, now_nanos());
            sender.try_send(event).is_ok()
        };
        let ticket = loaded.service.submit(Submission { prompt, task, priority, sink: Box::new(sink) })?;
        Ok(Generation { events, ticket, is_done: false })
    }
}

/// An answer on its way: a stream of what comes of it, an error last if it is none. Dropped, it is not wanted any more.
pub(super) struct Generation {
    events: mpsc::Receiver<Event>,
    ticket: Ticket,
    is_done: bool,
}

impl Drop for Generation {
    fn drop(&mut self) {
        // One that has ended is left alone.
        self.ticket.cancel();
    }
}

/// An answer that is whole.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) tokens: Vec<Token>,
    pub(super) finish: Finish,
}

/// What comes of a [`Generation`] next.
pub(super) enum Next {
    Token(Token),
    Finished(Finish),
    Embedding(Vec<f32>, usize),
}

impl Stream for Generation {
    type Item = ApiResult<Next>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_done {
            return Poll::Ready(None);
        }
        let Poll::Ready(event) = self.events.poll_recv(context) else { return Poll::Pending };
        self.is_done = !matches!(event, Some(Event::Token(_)));
        Poll::Ready(Some(match event {
            Some(Event::Token(token)) => Ok(Next::Token(token)),
            Some(Event::Finished(finish)) if finish.reason == FinishReason::Cancelled => {
                Err(ApiError::unavailable("cancelled", "the answer was ended by the server"))
            }
            Some(Event::Finished(finish)) => Ok(Next::Finished(finish)),
            Some(Event::Embedding(embedding, num_tokens)) => Ok(Next::Embedding(embedding, num_tokens)),
            Some(Event::Failed(message)) => Err(ApiError::internal(message)),
            None => Err(ApiError::internal("the model ended before its answer did")),
        }))
    }
}

impl Generation {
    /// All of it.
    pub(super) async fn collect(mut self) -> ApiResult<Answer> {
        let mut tokens = Vec::new();
        loop {
            match self.next().await.transpose()? {
                Some(Next::Token(token)) => tokens.push(token),
                Some(Next::Finished(finish)) => return Ok(Answer { tokens, finish }),
                _ => return Err(ApiError::internal("the model embedded a text that it should go on with")),
            }
        }
    }

    /// The embedding, and how many tokens its text has.
    pub(super) async fn embedding(mut self) -> ApiResult<(Vec<f32>, usize)> {
        match self.next().await.transpose()? {
            Some(Next::Embedding(embedding, num_tokens)) => Ok((embedding, num_tokens)),
            _ => Err(ApiError::internal("the model went on with a text that it should embed")),
        }
    }
}

impl Answer {
    /// Its text.
    pub(super) fn text(&self) -> String {
        self.tokens.iter().map(|token| token.text.as_str()).chain([self.finish.text.as_str()]).collect()
    }
}

/// Does what takes a processor's time elsewhere, so that other answers go on meanwhile.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> ApiResult<T> + Send + 'static) -> ApiResult<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| ApiError::internal(error.to_string()))?
}

/// Prompts as tokens. With `begins`, texts get the token in front that the model was trained with.
pub(super) async fn encode(loaded: &Arc<Loaded>, prompts: Vec<Prompt>, begins: bool) -> ApiResult<Vec<Vec<u32>>> {
    let loaded = loaded.clone();
    aside(move || prompts.into_iter().map(|prompt| tokens_of(&loaded, prompt, begins)).collect()).await
}

/// A prompt as tokens.
pub(super) fn tokens_of(loaded: &Loaded, prompt: Prompt, begins: bool) -> ApiResult<Vec<u32>> {
    let text = match prompt {
        Prompt::Tokens(tokens) => return Ok(tokens),
        Prompt::Text(text) => text,
    };
    let encoded = loaded.tokenizer.encode_with_special(&text);
    let encoded = encoded.map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(loaded.begin_token.filter(|_| begins).into_iter().chain(encoded).collect())
}
