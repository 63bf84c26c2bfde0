//! The server that a run is watched and steered by, if its scene wants one; a model that serves may have one, too.

#[cfg(feature = "remote")]
use std::net::SocketAddr;
use std::{path::Path, sync::Arc};

use engine::control::ControlHandle;

use crate::{api::Progress, scene::Scene, session::SessionError};

/// A server that ends when it is dropped.
#[cfg(feature = "remote")]
pub(crate) type Guard = Option<engine::remote::Server>;
/// There is none.
#[cfg(not(feature = "remote"))]
pub(crate) type Guard = Option<Box<dyn std::any::Any>>;

/// Starts it, and says where it is.
///
/// # Errors
/// If the scene's address cannot be listened on, or the run's folder not be written to.
#[cfg(feature = "remote")]
pub(crate) fn start(
    scene: &Scene,
    dir: &Path,
    handle: &ControlHandle,
    progress: &Arc<dyn Progress>,
) -> Result<Guard, SessionError> {
    let Some(remote) = &scene.remote else { return Ok(None) };
    let bind = remote.address().map_err(|message| SessionError::input(format!("`remote.bind` {message}")))?;
    listen(bind, dir, handle, progress).map(Some)
}

/// Starts it at `bind`, and says where it is; port 0 takes a free one. Its files are in `dir` until it is dropped: `remote.json`, and the
/// token in `remote.token`, mode 0600.
///
/// # Errors
/// If the address cannot be listened on, or the folder not be written to.
#[cfg(feature = "remote")]
pub fn listen(
    bind: SocketAddr,
    dir: &Path,
    handle: &ControlHandle,
    progress: &Arc<dyn Progress>,
) -> Result<engine::remote::Server, SessionError> {
    let options = engine::remote::ServerOptions { bind, dir: dir.to_owned(), handle: handle.clone() };
    let server = engine::remote::Server::start(options).map_err(SessionError::runtime)?;
    let token = dir.join("remote.token");
    progress.note(&format!("listening at {}; the token for changes is in {}", server.url(), token.display()));
    if !server.address().ip().is_loopback() {
        progress
            .note("other machines reach this address, and what goes over it is plain text: a tunnel would be safer");
    }
    Ok(server)
}

/// A scene with a server is no valid scene of this program.
///
/// # Errors
/// If the scene wants one.
#[cfg(not(feature = "remote"))]
pub(crate) fn start(scene: &Scene, _: &Path, _: &ControlHandle, _: &Arc<dyn Progress>) -> Result<Guard, SessionError> {
    match &scene.remote {
        None => Ok(None),
        Some(_) => {
            Err(SessionError::input("`remote` cannot be had: this program was built without the feature `remote`"))
        }
    }
}
