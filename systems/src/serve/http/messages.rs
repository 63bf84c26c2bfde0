//! Messages and tools of a chat, checked and brought into the shape that templates know.

use serde_json::{Map, Value};

use super::{
    error::{ApiError, ApiResult},
    fields::{Fields, expected},
};

/// What is asked of a chat template.
#[derive(Clone, Debug, Default)]
pub(super) struct Chat {
    pub(super) messages: Vec<Value>,
    pub(super) tools: Option<Vec<Value>>,
    /// Further variables of the template.
    pub(super) options: Map<String, Value>,
    /// Whether the next answer is begun.
    pub(super) is_open: bool,
}

impl Chat {
    /// Reads `messages`, `tools`, `tool_choice`, and vLLM's `add_generation_prompt` and `chat_template_kwargs`.
    pub(super) fn read(fields: &mut Fields) -> ApiResult<Self> {
        let messages = fields.list("messages")?.unwrap_or_default();
        if messages.is_empty() {
            return Err(ApiError::param("messages", "expected at least one message; found none"));
        }
        let message = |(index, value)| message(&format!("messages[{index}]"), value);
        let messages = messages.into_iter().enumerate().map(message).collect::<ApiResult<_>>()?;
        let tools = fields.list("tools")?.filter(|tools| !tools.is_empty());
        for tool in tools.iter().flatten() {
            if tool.pointer("/function/name").and_then(Value::as_str).is_none() {
                return Err(expected("tools", "objects with a `function` that has a `name`", tool));
            }
        }
        let tools = match fields.take("tool_choice") {
            None => tools,
            Some(Value::String(choice)) if choice == "auto" => tools,
            Some(Value::String(choice)) if choice == "none" => None,
            Some(other) => {
                let what = "`auto` or `none`: whether a tool is called is the model's choice";
                return Err(expected("tool_choice", what, &other));
            }
        };
        let options = fields.object("chat_template_kwargs")?.unwrap_or_default();
        let is_open = fields.flag("add_generation_prompt")?.unwrap_or(true);
        Ok(Chat { messages, tools, options, is_open })
    }
}

/// A message for the template: content is one text, arguments of calls are objects.
fn message(name: &str, value: Value) -> ApiResult<Value> {
    let Value::Object(mut map) = value else { return Err(expected(name, "an object", &value)) };
    let role = map.get("role").cloned().unwrap_or_default();
    match role.as_str() {
        None | Some("") => return Err(expected(&format!("{name}.role"), "a text", &role)),
        // OpenAI's newer word; no template knows it.
        Some("developer") => drop(map.insert("role".into(), "system".into())),
        Some(_) => {}
    }
    let content = map.remove("content").unwrap_or_default();
    let content_name = format!("{name}.content");
    let content = match content {
        Value::Null if map.contains_key("tool_calls") => Value::from(""),
        Value::String(_) => content,
        Value::Array(parts) => {
            let text = |part: &Value| {
                let is_text = part.get("type").and_then(Value::as_str) == Some("text");
                let text = part.get("text").and_then(Value::as_str).filter(|_| is_text);
                text.map(str::to_owned).ok_or_else(|| expected(&content_name, "parts of the type `text`", part))
            };
            parts.iter().map(text).collect::<ApiResult<Vec<_>>>()?.join("\n").into()
        }
        other => return Err(expected(&content_name, "a text, or a list of parts", &other)),
    };
    map.insert("content".into(), content);
    if let Some(calls) = map.get_mut("tool_calls") {
        let Value::Array(calls) = calls else { return Err(expected(&format!("{name}.tool_calls"), "a list", calls)) };
        for call in calls {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            if let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok()) {
                *arguments = parsed;
            }
        }
    }
    Ok(Value::Object(map))
}
