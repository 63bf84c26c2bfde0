//! What a server is told when it starts, and the model that it is given once there is one.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use super::chat::{ChatError, ChatTemplate};
use crate::{
    data::tokenizer::Tokenizer,
    serve::{Service, grammar::Vocabulary},
};

/// How to serve. The defaults are those of a server for this machine alone.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// What the model is called: in answers, in `/v1/models`, in metrics; a request that names another one is refused.
    pub model_name: String,
    /// What a request must show as `Authorization: Bearer KEY`. With a key, nothing but `/health` answers without it.
    pub api_key: Option<String>,
    /// Pages from these origins (`https://host:port`, or `*` for all) may use the server; none by default.
    pub cors_origins: Vec<String>,
    /// Longest body of a request, in bytes.
    pub max_body_bytes: usize,
    /// Longest time from a request to the end of its answer.
    pub request_timeout: Duration,
    /// Before the names of metrics, and a colon; `vllm` makes them those of vLLM.
    pub metrics_prefix: String,
    /// Connections at one time; more are told to come later.
    pub max_connections: usize,
    /// Answers of one request at most: its prompts times `n`.
    pub max_choices: usize,
    /// How long answers that run may go on when the server is told to end.
    pub drain: Duration,
}

impl Default for HttpConfig {
    fn default() -> Self {
        HttpConfig {
            model_name: "hadal".into(),
            api_key: None,
            cors_origins: Vec::new(),
            max_body_bytes: 4 << 20,
            request_timeout: Duration::from_secs(600),
            metrics_prefix: "hadal".into(),
            max_connections: 1024,
            max_choices: 128,
            drain: Duration::from_secs(30),
        }
    }
}

/// A model that is there.
pub struct Loaded {
    /// Where requests go.
    pub service: Service,
    /// Text to tokens.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text.
    pub chat: ChatTemplate,
    /// Tokens that end an answer, beside the end of text.
    pub stop_tokens: Vec<u32>,
    /// The token in front of every text, if the model was trained so.
    pub begin_token: Option<u32>,
    /// When it was loaded, in seconds since 1970.
    pub created_unix_secs: i64,
    /// Tokens as grammars see them: made when the first one comes.
    vocabulary: OnceLock<Result<Vocabulary, String>>,
}

impl Loaded {
    /// Reads what a checkpoint's folder says about chats, the first token and the last: `tokenizer_config.json`, `chat_template.jinja` and
    /// `generation_config.json`, each if it is there. `template` is a file that replaces the folder's template.
    ///
    /// # Errors
    /// A file that cannot be read, is no JSON, or holds no valid template.
    pub fn open(
        service: Service,
        tokenizer: Arc<Tokenizer>,
        folder: &Path,
        template: Option<&Path>,
    ) -> Result<Self, ChatError> {
        let chat = ChatTemplate::open(folder, template)?;
        let id = |name: &str| tokenizer.token_id(name);
        let mut stop_tokens = super::chat::end_tokens(folder)?;
        stop_tokens.extend(chat.end_token().and_then(id));
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let begin_token = chat.begin_token().and_then(id);
        let created_unix_secs = jiff::Timestamp::now().as_second();
        let vocabulary = OnceLock::new();
        Ok(Loaded { service, tokenizer, chat, stop_tokens, begin_token, created_unix_secs, vocabulary })
    }

    /// Tokens as grammars see them.
    ///
    /// # Errors
    /// If an ending token is not the model's.
    pub fn vocabulary(&self) -> Result<&Vocabulary, String> {
        let make = || Vocabulary::new(&self.tokenizer, self.service.settings().vocab_size, &self.stop_tokens);
        self.vocabulary.get_or_init(make).as_ref().map_err(Clone::clone)
    }
}
