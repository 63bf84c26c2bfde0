//! A run in another process, on this machine or another one.

use std::path::Path;

use engine::remote::client::{Client, ClientEvent};
use serde_json::Value;

use super::{Source, SourceEvent, Wake};

/// A connection that is made anew when it is lost.
pub struct RemoteSource {
    url: String,
    client: Client,
    num_dropped: u64,
}

impl RemoteSource {
    /// Follows the run at `url`; the token in `token_file` lets it be changed, too.
    ///
    /// # Errors
    /// If the token cannot be read.
    pub fn connect(url: &str, token_file: Option<&Path>, wake: Wake) -> Result<Self, String> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|e| format!("cannot read the token in {}: {e}", path.display()))
        };
        let token = token_file.map(read).transpose()?.map(|token| token.trim().to_owned());
        Ok(RemoteSource { url: url.to_owned(), client: Client::connect(url, token, wake), num_dropped: 0 })
    }
}

impl Source for RemoteSource {
    fn name(&self) -> &str {
        &self.url
    }

    fn poll(&mut self) -> Vec<SourceEvent> {
        let mut events = Vec::new();
        while let Some(event) = self.client.try_event() {
            events.push(match event {
                ClientEvent::Connected { name } => SourceEvent::Connected(name),
                ClientEvent::Lost { why } => SourceEvent::Lost(why),
                ClientEvent::Snapshot(snapshot) => SourceEvent::Snapshot(snapshot),
                ClientEvent::Dropped(more) => {
                    self.num_dropped += more;
                    SourceEvent::Dropped(self.num_dropped)
                }
                ClientEvent::Reply { id, result } => {
                    SourceEvent::Reply { id, result: result.map_err(|error| error.to_string()) }
                }
            });
        }
        events
    }

    fn call(&mut self, method: &str, params: Value) -> Option<u64> {
        Some(self.client.call(method, params))
    }
}
