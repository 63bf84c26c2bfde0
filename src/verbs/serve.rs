//! `hadal serve`: a model over HTTP, until a signal says that it is enough.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use engine::control::{self, ControlHandle};
use systems::{
    api::Progress,
    remote,
    serve::{
        Host, HostOptions, HostRequest, WatchPlugin,
        http::{HttpConfig, HttpServer, Loaded},
    },
};

use crate::{cli::ServeArgs, failure::Failure, load::checkpoint, progress::TextProgress, signals, units};

/// How often the server looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// Serves.
///
/// # Errors
/// If the checkpoint cannot be used, the address is not to be had, or a step of the model fails.
pub fn serve(args: &ServeArgs) -> Result<ExitCode, Failure> {
    let checkpoint = checkpoint(&args.source, &args.overrides.set)?;
    let stop = signals::listen().map_err(|e| Failure::runtime(format!("cannot listen to signals: {e}")))?;
    let config = HttpConfig {
        model_name: args.served_model_name.clone().unwrap_or_else(|| model_name(&checkpoint)),
        api_key: args.api_key.clone().filter(|key| !key.is_empty()),
        cors_origins: args.cors_origin.clone(),
        max_body_bytes: args.max_body_bytes,
        request_timeout: Duration::from_secs(args.request_timeout_secs as u64),
        metrics_prefix: args.metrics_prefix.clone(),
        drain: Duration::from_secs(args.drain_secs as u64),
        ..HttpConfig::default()
    };
    let (name, has_key) = (config.model_name.clone(), config.api_key.is_some());
    let http = HttpServer::start(SocketAddr::new(args.host, args.port), config).map_err(Failure::runtime)?;
    eprintln!("listening on {}; loading {}", http.url(), checkpoint.display());
    if !args.host.is_loopback() && !has_key {
        eprintln!("warning: {} can be reached from elsewhere, and no key is asked for: set --api-key", http.url());
    }
    let progress: Arc<dyn Progress> = Arc::new(TextProgress { to_stdout: false });
    let (mut watch, mut door) = (None, None);
    if let Some(bind) = args.remote {
        let (handle, inbox) = control::channel();
        let dir = args.remote_dir.clone().unwrap_or_else(|| format!("runs/serve/{}", http.address().port()).into());
        door = Some(Door::open(bind, dir, &handle, &progress)?);
        let progress = progress.clone();
        watch = Some(WatchPlugin { name: name.clone(), inbox, note: Arc::new(move |line| progress.note(line)) });
    }
    let host = Host::start(HostRequest {
        checkpoint: checkpoint.clone(),
        compute: args.precision.precision.into(),
        device: args.precision.device,
        options: HostOptions::from(&args.capacity),
        progress,
        watch,
    })?;
    let (service, tokenizer) = (host.service.clone(), host.tokenizer.clone());
    let loaded = Loaded::open(service, tokenizer, &checkpoint, args.chat_template.as_deref());
    http.serve(loaded.map_err(|e| Failure::usage(e, "mend the file, or name another with --chat-template"))?);
    let settings = host.service.settings();
    let (latent, plain) = (settings.cache_bytes_per_token, settings.mha_cache_bytes_per_token);
    eprintln!(
        "serving `{name}` at {}: contexts of {} tokens, cache of {} tokens in {}, {} each (plain multi-head attention: {}, \
         {:.0}% more)",
        http.url(),
        units::grouped(settings.max_context_tokens as u64),
        units::grouped(settings.cache_capacity_tokens as u64),
        units::bytes(latent * settings.cache_capacity_tokens as u64),
        units::bytes(latent),
        units::bytes(plain),
        100.0 * (plain as f64 / latent.max(1) as f64 - 1.0),
    );
    while stop.load(Ordering::Relaxed) == 0 && !host.has_ended() {
        std::thread::sleep(TICK);
    }
    let signal = stop.load(Ordering::Relaxed);
    if signal != 0 {
        eprintln!("{}: no new requests; running ones have {} s to end", signals::name(signal), args.drain_secs);
    }
    http.stop().map_err(Failure::runtime)?;
    host.finish()?;
    // Last: who watches is told of the end, and then left.
    drop(door);
    Ok(if signal == 0 { ExitCode::SUCCESS } else { ExitCode::from(128 + signal as u8) })
}

/// The server that the model is watched by, and the folder of its files.
struct Door {
    server: Option<engine::remote::Server>,
    dir: PathBuf,
}

impl Door {
    fn open(
        bind: SocketAddr,
        dir: PathBuf,
        handle: &ControlHandle,
        progress: &Arc<dyn Progress>,
    ) -> Result<Self, Failure> {
        let create = |e| Failure::runtime(format!("create {}: {e}; choose another with --remote-dir", dir.display()));
        std::fs::create_dir_all(&dir).map_err(create)?;
        let server = remote::listen(bind, &dir, handle, progress)?;
        Ok(Door { server: Some(server), dir })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        drop(self.server.take());
        // A folder with anything else in it stays.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// A folder's name; of a run's checkpoint that of the run.
fn model_name(checkpoint: &Path) -> String {
    let whole = checkpoint.canonicalize().unwrap_or_else(|_| checkpoint.into());
    let mut names = whole.ancestors().filter_map(|path| path.file_name()?.to_str());
    let run = whole.ancestors().find(|path| path.file_name().is_some_and(|name| name == "checkpoints"));
    let run = run.and_then(|checkpoints| checkpoints.parent()?.file_name()?.to_str());
    run.or_else(|| names.next()).unwrap_or("hadal").to_owned()
}
