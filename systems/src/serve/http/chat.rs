//! Messages to a prompt, by the template that a checkpoint brings along: Jinja, in the environment that Hugging Face transformers
//! renders it in (`trim_blocks`, `lstrip_blocks`, loop controls, methods of Python's texts and maps, `raise_exception`, `strftime_now`,
//! `tojson` as Python writes it).
//!
//! A checkpoint without a template gets [`PLAIN_TEMPLATE`]: a transcript that a model of plain text can go on with. The next
//! speaker's turn ends the answer.

use std::{
    fs,
    path::{Path, PathBuf},
};

use minijinja::{
    Environment, ErrorKind, Value as Jinja, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde_json::{Map, Value};

use super::python_json;

/// For checkpoints without a template: `User: ..`, `Assistant: ..`, a blank line between turns.
pub const PLAIN_TEMPLATE: &str = "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n{% endfor %}\
    {% if add_generation_prompt %}Assistant:{% endif %}";

/// What ends an answer under [`PLAIN_TEMPLATE`].
pub const PLAIN_STOPS: [&str; 2] = ["\n\nUser:", "\n\nSystem:"];

/// What rendering may cost: an instruction each, and 64 bytes each.
const FUEL: u64 = 20_000_000;

/// A template, or what says which it is, cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not what it should be.
    #[error("{}: {found}", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// What was expected and found.
        found: String,
    },
}

/// Messages to text.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// Special tokens by their names in templates: `bos_token` and others.
    specials: Map<String, Value>,
    has_tool_template: bool,
    adds_begin_token: bool,
    is_plain: bool,
}

impl ChatTemplate {
    /// The template of a checkpoint's folder, or [`PLAIN_TEMPLATE`]. A `file` is used in place of it.
    ///
    /// # Errors
    /// A file that cannot be read or parsed.
    pub fn open(folder: &Path, file: Option<&Path>) -> Result<Self, ChatError> {
        let config_path = folder.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or_default();
        let own_path = folder.join("chat_template.jinja");
        let path = file.unwrap_or(if own_path.is_file() { &own_path } else { &config_path });
        let unusable = |found: String| ChatError::Unusable { path: path.into(), found };
        let mut templates: Vec<(String, String)> = Vec::new();
        if path != config_path {
            let text = fs::read_to_string(path).map_err(|source| ChatError::Io { path: path.into(), source })?;
            templates.push(("default".into(), text));
        } else {
            match config.get("chat_template") {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) => templates.push(("default".into(), text.clone())),
                Some(Value::Array(named)) => {
                    for item in named {
                        let field = |name| item.get(name).and_then(Value::as_str).map(str::to_owned);
                        let pair = field("name").zip(field("template"));
                        let expected = "`chat_template`: expected objects with a `name` and a `template`";
                        templates.push(pair.ok_or_else(|| unusable(format!("{expected}, found {item}")))?);
                    }
                }
                Some(other) => return Err(unusable(format!("`chat_template`: expected a text, found {other}"))),
            }
        }
        let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        let specials = names.into_iter().filter_map(|name| Some((name.into(), text_of(config.get(name)?)?.into())));
        let is_plain = templates.is_empty();
        let adds_begin_token = config.get("add_bos_token").and_then(Value::as_bool).unwrap_or(false);
        let chat = Self::new(templates, specials.collect()).map_err(|error| unusable(describe(&error)))?;
        Ok(ChatTemplate { is_plain, adds_begin_token, ..chat })
    }

    /// Templates by name, and special tokens. Of several templates, `tool_use` is for requests with tools, `default` for all others.
    fn new(templates: Vec<(String, String)>, specials: Map<String, Value>) -> Result<Self, minijinja::Error> {
        let mut env = Environment::new();
        env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.add_filter("tojson", |value: Jinja, options: Kwargs| {
            let indent: Option<usize> = options.get("indent")?;
            // Others of `json.dumps` change nothing that a model was trained on.
            for known in ["ensure_ascii", "sort_keys", "separators"] {
                options.get::<Option<Jinja>>(known)?;
            }
            options.assert_all_used()?;
            python_json::write(&value, indent)
        });
        env.add_function("raise_exception", |message: String| -> Result<Jinja, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| {
            let text = jiff::fmt::strtime::format(&format, &jiff::ZonedDateTime::now());
            text.map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
        });
        env.add_template("default", PLAIN_TEMPLATE)?;
        let has_tool_template = templates.iter().any(|(name, _)| name == "tool_use");
        for (name, text) in templates {
            env.add_template_owned(name, text)?;
        }
        Ok(ChatTemplate { env, specials, has_tool_template, adds_begin_token: false, is_plain: false })
    }

    /// The prompt of a chat. `options` are further variables of the template; `is_open` asks for the next answer's beginning.
    ///
    /// # Errors
    /// What the template finds wrong with the messages.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        options: &Map<String, Value>,
        is_open: bool,
    ) -> Result<String, String> {
        let name = if tools.is_some() && self.has_tool_template { "tool_use" } else { "default" };
        let own = context! { messages => Serde(messages), tools => tools.map(Serde), add_generation_prompt => is_open };
        let rendered = self.env.get_template(name).and_then(|template| {
            template.render(context! { ..own, ..Jinja::from(Serde(options)), ..Jinja::from(Serde(&self.specials)) })
        });
        rendered.map_err(|error| describe(&error))
    }

    /// Texts that end an answer, because the template needs them.
    pub fn stops(&self) -> &'static [&'static str] {
        if self.is_plain { &PLAIN_STOPS } else { &[] }
    }

    /// The token that ends an answer, by name.
    pub(super) fn end_token(&self) -> Option<&str> {
        self.specials.get("eos_token")?.as_str()
    }

    /// The token that goes before every text, by name.
    pub(super) fn begin_token(&self) -> Option<&str> {
        self.adds_begin_token.then(|| self.specials.get("bos_token")?.as_str()).flatten()
    }
}

/// Tokens that `generation_config.json` has answers end with.
pub(super) fn end_tokens(folder: &Path) -> Result<Vec<u32>, ChatError> {
    let path = folder.join("generation_config.json");
    let Some(config) = read_json(&path)? else { return Ok(Vec::new()) };
    let ids = match config.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) => vec![id.clone()],
    };
    let number = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    let all: Option<Vec<u32>> = ids.iter().map(number).collect();
    all.ok_or_else(|| {
        let found = format!("`eos_token_id`: expected a token or a list of tokens, found {}", Value::from(ids));
        ChatError::Unusable { path, found }
    })
}

fn read_json(path: &Path) -> Result<Option<Value>, ChatError> {
    match fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|error| {
            let found = format!("expected JSON, found something else ({error})");
            ChatError::Unusable { path: path.into(), found }
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ChatError::Io { path: path.into(), source }),
    }
}

/// A special token is a text, or an object that says more about it.
fn text_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn describe(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    error.line().map_or_else(|| what.clone(), |line| format!("{what} (the chat template, line {line})"))
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
