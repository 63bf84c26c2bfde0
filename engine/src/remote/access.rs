//! Who may do what: a token made for each run, and web pages from elsewhere kept out.
//!
//! The token is in two files of the run's folder that only their owner can read. A browser says where a page comes from; a page
//! from elsewhere is refused whatever it knows, since its owner need not be the one at the keyboard. The host that a request
//! names is looked at for the same reason: a page can have its name point to this machine.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use axum::http::{HeaderMap, header};
use serde_json::json;
use subtle::ConstantTimeEq;

/// The token alone.
pub(super) const TOKEN_FILE: &str = "remote.token";
/// Where the server is, and the token.
pub(super) const ADDRESS_FILE: &str = "remote.json";

/// A run's secret.
#[derive(Clone)]
pub(super) struct Token(String);

impl Token {
    /// 256 bits from the operating system, as hexadecimal digits.
    pub(super) fn new() -> io::Result<Self> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        Ok(Token(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// Whether a request carries it; `None` if it carries none at all. Takes the same time whatever is wrong with it.
    pub(super) fn in_headers(&self, headers: &HeaderMap) -> Option<bool> {
        let given = headers.get(header::AUTHORIZATION)?.as_bytes();
        Some(bearer(given).unwrap_or(given).ct_eq(self.0.as_bytes()).into())
    }
}

/// The files that say where a server is; gone when this is dropped.
pub(super) struct Files(Vec<PathBuf>);

impl Files {
    /// Writes them into `dir`, readable for their owner only.
    pub(super) fn write(dir: &Path, address: SocketAddr, token: &Token) -> io::Result<Self> {
        let files = Files([TOKEN_FILE, ADDRESS_FILE].map(|name| dir.join(name)).into());
        let document = json!({ "url": url(address), "token": token.0, "pid": std::process::id() });
        for (path, text) in files.0.iter().zip([token.0.clone(), format!("{document:#}")]) {
            // Beside it, then renamed: who looks finds all of it or nothing.
            let fresh = path.with_extension("tmp");
            match fs::remove_file(&fresh) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
            writeln!(file, "{text}")?;
            fs::rename(&fresh, path)?;
        }
        Ok(files)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            // They may have been tidied away.
            let _ = fs::remove_file(path);
        }
    }
}

/// Where a client of this machine finds a server that listens on `address`.
pub fn url(address: SocketAddr) -> String {
    let mut reachable = address;
    if address.ip().is_unspecified() {
        reachable.set_ip(if address.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
        });
    }
    format!("http://{reachable}")
}

/// The secret of an `Authorization` header, if it is of the scheme `Bearer`.
pub fn bearer(header: &[u8]) -> Option<&[u8]> {
    // Names of schemes have no case (RFC 9110, section 11.1).
    let (scheme, secret) = header.split_at_checked(b"Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(secret)
}

/// Why a request is refused before it is looked at, if it is.
pub(super) fn refusal(headers: &HeaderMap, is_loopback: bool) -> Option<String> {
    let text = |name| headers.get(name).map(|value: &axum::http::HeaderValue| value.to_str().unwrap_or("?"));
    let host = text(header::HOST).unwrap_or_default();
    if is_loopback && !is_of_this_machine(host) {
        return Some(format!("expected a request to this machine, found one to `{host}`"));
    }
    match text(header::ORIGIN) {
        None => None,
        Some(origin) if origin.split_once("://").is_some_and(|(_, authority)| authority == host) => None,
        Some(origin) => Some(format!("a page of `{origin}` may not look at or change a run")),
    }
}

/// Whether a request's `host:port` names this machine or one by its number.
pub fn is_of_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn headers(list: &[(&str, &str)]) -> HeaderMap {
        let pair =
            |&(name, value): &(&str, &str)| (header::HeaderName::try_from(name).unwrap(), value.try_into().unwrap());
        list.iter().map(pair).collect()
    }

    #[test]
    fn pages_from_elsewhere_are_refused() {
        for (host, origin, is_loopback, is_refused) in [
            ("127.0.0.1:9", None, true, false),
            ("localhost:9", None, true, false),
            ("[::1]:9", None, true, false),
            ("evil.example:9", None, true, true),
            ("node7:9", None, false, false),
            ("127.0.0.1:9", Some("http://127.0.0.1:9"), true, false),
            ("127.0.0.1:9", Some("http://127.0.0.1:8"), true, true),
            ("127.0.0.1:9", Some("https://evil.example"), true, true),
            ("node7:9", Some("https://evil.example"), false, true),
            ("127.0.0.1:9", Some("null"), true, true),
            ("", None, true, true),
        ] {
            let mut list = vec![("host", host)];
            list.extend(origin.map(|origin| ("origin", origin)));
            assert_eq!(refusal(&headers(&list), is_loopback).is_some(), is_refused, "{list:?}");
        }
    }

    #[test]
    fn a_token_is_told_from_another() {
        let (token, other) = (Token::new().unwrap(), Token::new().unwrap());
        assert_eq!(token.0.len(), 64);
        assert_eq!(token.in_headers(&headers(&[])), None);
        for (value, fits) in [
            (format!("Bearer {}", token.0), true),
            (format!("Bearer {}", other.0), false),
            (format!("Bearer {}", &token.0[..63]), false),
            (format!("Bearer {}0", token.0), false),
            ("Bearer ".to_owned(), false),
        ] {
            assert_eq!(token.in_headers(&headers(&[("authorization", &value)])), Some(fits), "{value}");
        }
    }

    #[test]
    fn only_their_owner_reads_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let token = Token::new().unwrap();
        let address = "0.0.0.0:77".parse().unwrap();
        // What an earlier run left is no obstacle.
        drop(Files::write(dir.path(), address, &Token::new().unwrap()).unwrap());
        fs::write(dir.path().join(TOKEN_FILE), "old").unwrap();
        let files = Files::write(dir.path(), address, &token).unwrap();
        for name in [TOKEN_FILE, ADDRESS_FILE] {
            let path = dir.path().join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
            assert!(fs::read_to_string(&path).unwrap().contains(&token.0));
        }
        let text = fs::read_to_string(dir.path().join(ADDRESS_FILE)).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["url"], "http://127.0.0.1:77");
        drop(files);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
