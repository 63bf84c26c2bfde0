//! Answers in pieces, as server-sent events: `data: {piece}` for each, `data: [DONE]` at the end.
//!
//! What the pieces are is said by [`Pieces`], without a clock or a connection. A task of its own waits for the model and for the
//! client, whichever goes first: a client that is gone takes its answers with it.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::Value;
use tokio::{
    sync::mpsc,
    time::{Instant, interval_at},
};
use tokio_stream::{StreamExt, StreamMap};

use super::{
    app::{App, Generation, Next},
    error::{ApiError, ApiResult},
};
use crate::serve::{Finish, Token};

/// Pieces that wait for a slow client; after these, the model's events wait in a channel that holds all of them.
const MAX_WAITING: usize = 16;
/// How often a line without meaning tells proxies that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What is sent, given what happens to the answers.
pub(super) trait Pieces: Send + 'static {
    /// Before the first token.
    fn begin(&mut self) -> Vec<Value>;
    /// For a token of an answer.
    fn token(&mut self, index: usize, token: Token) -> Vec<Value>;
    /// For an answer's end.
    fn finish(&mut self, index: usize, finish: Finish) -> Vec<Value>;
    /// When all have ended.
    fn end(&mut self) -> Vec<Value>;
}

type Out = mpsc::Sender<Result<Bytes, Infallible>>;

/// A response that grows.
pub(super) fn respond(
    app: &Arc<App>,
    deadline: Instant,
    answers: Vec<Generation>,
    mut pieces: impl Pieces,
) -> Response {
    let (out, body) = mpsc::channel(MAX_WAITING);
    let limit = app.limit(deadline);
    tokio::spawn(async move {
        tokio::select! {
            // The client is gone.
            () = out.closed() => {}
            error = limit => tell_if_it_listens(&out, &error),
            told = tell(&out, answers, &mut pieces) => {
                if let Err(error) = told {
                    tell_if_it_listens(&out, &error);
                }
            }
        }
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream; charset=utf-8"), (header::CACHE_CONTROL, "no-store")];
    let body = tokio_stream::wrappers::ReceiverStream::new(body);
    (headers, Body::from_stream(body)).into_response()
}

/// Sends all pieces. Stops when nobody listens any more.
async fn tell(out: &Out, answers: Vec<Generation>, pieces: &mut impl Pieces) -> ApiResult<()> {
    let mut open: StreamMap<usize, Generation> = StreamMap::new();
    let mut num_open = answers.len();
    for (index, answer) in answers.into_iter().enumerate() {
        open.insert(index, answer);
    }
    let mut keep_alive = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    send(out, pieces.begin()).await;
    while num_open > 0 {
        let (index, next) = tokio::select! {
            Some(next) = open.next() => next,
            _ = keep_alive.tick() => {
                let _ = out.send(Ok(Bytes::from_static(b":\n\n"))).await;
                continue;
            }
        };
        match next? {
            Next::Token(token) => send(out, pieces.token(index, token)).await,
            Next::Finished(finish) => {
                num_open -= 1;
                send(out, pieces.finish(index, finish)).await;
            }
            Next::Embedding(..) => {
                return Err(ApiError::internal("the model embedded a text that it should go on with"));
            }
        }
    }
    send(out, pieces.end()).await;
    let _ = out.send(Ok(Bytes::from_static(b"data: [DONE]\n\n"))).await;
    Ok(())
}

async fn send(out: &Out, pieces: Vec<Value>) {
    for piece in pieces {
        // Nobody listening ends all of this from outside.
        let _ = out.send(Ok(format!("data: {piece}\n\n").into())).await;
    }
}

/// The status is sent long since: an error is a piece, as OpenAI's clients expect it.
fn tell_if_it_listens(out: &Out, error: &ApiError) {
    let _ = out.try_send(Ok(format!("data: {}\n\ndata: [DONE]\n\n", error.body()).into()));
}
