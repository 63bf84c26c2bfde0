//! `response_format`, and the one place where a schema becomes a [`Grammar`].

use std::sync::Arc;

use serde_json::Value;

use super::{
    app::aside,
    config::Loaded,
    error::{ApiError, ApiResult},
    fields::Fields,
};
use crate::serve::grammar::Grammar;

/// Reads `response_format`: `text`, `json_object` or `json_schema`.
pub(super) async fn of_request(fields: &mut Fields, loaded: &Arc<Loaded>) -> ApiResult<Option<Arc<Grammar>>> {
    let Some(mut format) = fields.within("response_format")? else { return Ok(None) };
    let kinds = "`text`, `json_object` or `json_schema`";
    match format.text("type")?.as_deref() {
        None | Some("text") => Ok(None),
        Some("json_object") => compile(loaded, serde_json::json!({ "type": "object" })).await.map(Some),
        Some("json_schema") => {
            let schema = format.within("json_schema")?.unwrap_or_default().object("schema")?;
            let missing =
                || ApiError::param("response_format", "expected a schema at `json_schema.schema`; found none");
            compile(loaded, schema.ok_or_else(missing)?.into()).await.map(Some)
        }
        Some(other) => Err(format.wrong("type", kinds, &other.into())),
    }
}

/// A schema for the model's tokens.
async fn compile(loaded: &Arc<Loaded>, schema: Value) -> ApiResult<Arc<Grammar>> {
    let loaded = loaded.clone();
    aside(move || {
        let of_tokens = loaded.vocabulary().and_then(|tokens| Grammar::json_schema(&schema, tokens));
        of_tokens.map(Arc::new).map_err(|why| ApiError::param("response_format", &why))
    })
    .await
}
