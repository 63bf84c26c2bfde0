//! The section that lets others watch and steer a run from elsewhere. A missing section means that nobody listens, at no cost.

use std::net::{SocketAddr, ToSocketAddrs};

use serde::{Deserialize, Serialize};

/// Watching and steering a run over HTTP and WebSocket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Remote {
    /// Where to listen, as `host:port`; port 0 takes a free one. An address that other machines reach wants the run's token for
    /// everything, and sends it and all else as plain text: an ssh tunnel to 127.0.0.1 is safer.
    pub bind: String,
}

impl Default for Remote {
    fn default() -> Self {
        Remote { bind: "127.0.0.1:0".to_owned() }
    }
}

impl Remote {
    /// The address to listen on.
    ///
    /// # Errors
    /// What is wrong with `bind`, as a scene's problem says it.
    pub fn address(&self) -> Result<SocketAddr, String> {
        let Some((host, port)) = self.bind.rsplit_once(':') else {
            return Err(format!("must be `host:port`, as in \"127.0.0.1:0\", but is {:?}", self.bind));
        };
        if port.parse::<u16>().is_err() {
            return Err(format!("must end with a port from 0 to 65535, but is {:?}", self.bind));
        }
        let mut found =
            self.bind.to_socket_addrs().map_err(|error| format!("names the unknown host `{host}`: {error}"))?;
        found.next().ok_or_else(|| format!("names the host `{host}`, which has no address"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        let check = |bind: &str| Remote { bind: bind.to_owned() }.address();
        assert_eq!(check("127.0.0.1:0"), Ok(([127, 0, 0, 1], 0).into()));
        assert_eq!(check("[::1]:8080").map(|address| address.port()), Ok(8080));
        for (bind, says) in [
            ("127.0.0.1", "must be `host:port`"),
            ("127.0.0.1:http", "port from 0 to 65535"),
            ("127.0.0.1:65536", "port from 0 to 65535"),
            ("no.such.host.invalid:1", "names the unknown host `no.such.host.invalid`"),
            ("", "must be `host:port`"),
        ] {
            assert!(check(bind).is_err_and(|message| message.contains(says)), "{bind}");
        }
    }
}
