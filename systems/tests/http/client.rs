//! A server with a model that is none behind it, and what asks it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use kernels::clock::now_nanos;
use serde_json::{Value, json};
use systems::{
    data::tokenizer::Tokenizer,
    serve::http::{HttpConfig, HttpServer},
};
use ureq::http::Response;

use crate::fake_model::{self, FakeModel, Options};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The one tokenizer of all tests.
pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(fake_model::tokenizer).clone()
}

/// A server and its model; the server ends first.
pub struct Site {
    pub server: HttpServer,
    pub model: FakeModel,
    pub key: Option<String>,
}

/// What came back, whole.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub text: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// That it is an OpenAI error of this status; its object.
    #[track_caller]
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        let error = self.json()["error"].clone();
        let names: Vec<_> = error.as_object().unwrap_or_else(|| panic!("{}", self.text)).keys().cloned().collect();
        assert_eq!(names, ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|text| text.len() > 10), "{error}");
        error
    }
}

impl Site {
    /// With the defaults.
    pub fn new() -> Self {
        Site::with(HttpConfig::default(), Options::default())
    }

    pub fn with(config: HttpConfig, options: Options) -> Self {
        Site::with_folder(config, options, Path::new(""))
    }

    pub fn with_folder(config: HttpConfig, options: Options, folder: &Path) -> Self {
        let key = config.api_key.clone();
        let server = HttpServer::start("127.0.0.1:0".parse().unwrap(), config).unwrap();
        let model = FakeModel::start(tokenizer(), options);
        server.serve(model.loaded(folder));
        Site { server, model, key }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.server.url())
    }

    pub fn get(&self, path: &str) -> Reply {
        get(&self.url(path), self.key.as_deref())
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        whole(self.open(path, body))
    }

    /// Sends a request, and leaves its answer to be read.
    pub fn open(&self, path: &str, body: &Value) -> Response<ureq::Body> {
        let mut request = agent().post(self.url(path)).header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        request.send(body.to_string()).unwrap()
    }

    /// The pieces of a streamed answer.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let mut pieces = Pieces::new(self.open(path, &body));
        let found: Vec<Value> = pieces.by_ref().collect();
        assert!(pieces.is_done, "no [DONE] after {found:?}");
        found
    }

    /// Sends bytes as they are; all that comes back.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // It may be refused before it is all sent.
        let _ = stream.write_all(bytes);
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        String::from_utf8_lossy(&reply).into_owned()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.server.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// That it still answers.
    #[track_caller]
    pub fn assert_lives(&self) {
        let reply = self.post("/v1/completions", &json!({ "prompt": "still here", "max_tokens": 64 }));
        assert_eq!(reply.status, 200, "{}", reply.text);
        assert_eq!(reply.json()["choices"][0]["text"], "still here");
    }
}

/// Pieces of a stream as they come.
pub struct Pieces<R> {
    lines: BufReader<R>,
    pub is_done: bool,
}

impl Pieces<ureq::BodyReader<'static>> {
    #[track_caller]
    pub fn new(response: Response<ureq::Body>) -> Self {
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        Pieces { lines: BufReader::new(response.into_body().into_reader()), is_done: false }
    }
}

impl<R: Read> Iterator for Pieces<R> {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        while self.lines.read_line(&mut line).unwrap() > 0 {
            match line.trim_end().strip_prefix("data: ") {
                Some("[DONE]") => {
                    self.is_done = true;
                    return None;
                }
                Some(data) => return Some(serde_json::from_str(data).unwrap()),
                None => assert!(line.trim_end().is_empty() || line.starts_with(':'), "{line:?}"),
            }
            line.clear();
        }
        None
    }
}

pub fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build().into()
}

pub fn get(url: &str, key: Option<&str>) -> Reply {
    let mut request = agent().get(url);
    if let Some(key) = key {
        request = request.header("Authorization", format!("Bearer {key}"));
    }
    whole(request.call().unwrap())
}

pub fn whole(mut response: Response<ureq::Body>) -> Reply {
    let pair = |(name, value): (&ureq::http::HeaderName, &ureq::http::HeaderValue)| {
        (name.as_str().to_owned(), value.to_str().unwrap().to_owned())
    };
    let headers = response.headers().iter().map(pair).collect();
    Reply { status: response.status().as_u16(), headers, text: response.body_mut().read_to_string().unwrap() }
}

/// Waits until something is so.
#[track_caller]
pub fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let end = now_nanos() + PATIENCE.as_nanos() as u64;
    while !is_so() {
        assert!(now_nanos() < end, "waited for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A question.
pub fn ask(text: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }] })
}

/// One object with what another adds to it.
pub fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}
