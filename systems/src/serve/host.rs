//! A model on a thread of its own: loaded there, and asked from anywhere.

use std::{
    path::PathBuf,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use bevy_app::App;
use kernels::{device::Device, ops::mla::latent::Prefill};

use super::{
    cache::{self, CacheFormat},
    schedule::Limits,
    service::Service,
    step::{Capacity, ServePlugin, Server},
    watch::WatchPlugin,
};
use crate::{
    api::Progress,
    data::tokenizer::Tokenizer,
    generate::run_to_rest,
    hf::read::HfFolder,
    model_config::ModelConfig,
    probe::Checkpoint,
    scene::Compute,
    session::{SessionError, dtype},
    work::Work,
};

/// What to serve, and how much of it at a time.
#[derive(Clone)]
pub struct HostRequest {
    /// Hugging Face folder.
    pub checkpoint: PathBuf,
    /// Type to compute in.
    pub compute: Compute,
    /// What the model is on.
    pub device: Device,
    /// How much.
    pub options: HostOptions,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
    /// Who may watch, if anybody.
    pub watch: Option<WatchPlugin>,
}

/// What a caller may say of a server's capacity; what is left out follows from the model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostOptions {
    /// Tokens of a prompt and its answer at most; the model's own context at most, and 8,192 if nothing is said.
    pub max_context: Option<usize>,
    /// Bytes of the cache; 1 GiB, or what one request of the longest needs.
    pub cache_bytes: Option<u64>,
    /// Tokens of a step at most.
    pub step_tokens: Option<usize>,
    /// Requests that are computed at a time at most.
    pub max_running: Option<usize>,
    /// Requests that wait at most.
    pub max_queued: Option<usize>,
    /// Let the MTP module propose tokens.
    pub speculate: bool,
    /// What the cache is made of.
    pub cache: CacheFormat,
    /// Which way latent attention takes through prompts.
    pub prefill: Prefill,
}

const CACHE_BYTES: u64 = 1 << 30;

impl HostOptions {
    /// For a model, computed in `compute`.
    pub fn capacity(&self, config: &ModelConfig, compute: Compute) -> Capacity {
        let longest = config.max_position_embeddings;
        let max_context = self.max_context.unwrap_or(8192).min(longest);
        let mtp_layers = if self.speculate { config.num_nextn_predict_layers.min(1) } else { 0 };
        let per_token =
            cache::bytes_per_token(config, config.num_hidden_layers + mtp_layers, dtype(compute), self.cache);
        let cache_tokens = (self.cache_bytes.unwrap_or(CACHE_BYTES) / per_token.max(1)) as usize;
        let max_running = self.max_running.unwrap_or(64);
        // More than all of them could fill is of no use but to the prefix cache.
        let cache_tokens = cache_tokens.clamp(max_context, 4 * max_context * max_running.max(1));
        Capacity {
            max_context,
            cache_tokens,
            block_tokens: 16,
            limits: Limits { step_tokens: self.step_tokens.unwrap_or(512), max_running },
            max_queued: self.max_queued.unwrap_or(256),
            speculate: self.speculate,
            cache: self.cache,
            prefill: self.prefill,
        }
    }
}

/// A model that serves.
pub struct Host {
    /// The way in.
    pub service: Service,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    thread: JoinHandle<Result<(), SessionError>>,
}

impl Host {
    /// Loads a checkpoint, and returns when it serves.
    ///
    /// # Errors
    /// If the checkpoint cannot be used.
    pub fn start(request: HostRequest) -> Result<Host, SessionError> {
        Self::start_with(move || {
            let folder = HfFolder::open(&request.checkpoint).map_err(SessionError::input)?;
            let config = folder.model().map_err(SessionError::input)?.config;
            // Before weights are read.
            request.options.cache.check(&config).map_err(SessionError::input)?;
            let capacity = request.options.capacity(&config, request.compute);
            let on = (request.compute, request.device);
            let mut loaded = Checkpoint::load(&request.checkpoint, on, capacity.max_context, false, &request.progress)?;
            let tokenizer = Arc::new(loaded.tokenizer()?);
            if let Some(watch) = request.watch {
                loaded.app.add_plugins(watch);
            }
            Ok((loaded.app, tokenizer, capacity))
        })
    }

    /// The same of a model that `build` makes, on the thread that it is to live on.
    ///
    /// # Errors
    /// Those of `build`, and the operating system's if it gives no thread.
    pub fn start_with(
        build: impl FnOnce() -> Result<(App, Arc<Tokenizer>, Capacity), SessionError> + Send + 'static,
    ) -> Result<Host, SessionError> {
        let (ready, is_ready) = mpsc::sync_channel(1);
        let serve = move || {
            let built = build().and_then(|(mut app, tokenizer, capacity)| {
                let service = Server::start(app.world_mut(), tokenizer.clone(), capacity)?;
                app.insert_resource(Work::Serve).add_plugins(ServePlugin);
                Ok((app, service, tokenizer))
            });
            match built {
                Ok((mut app, service, tokenizer)) => {
                    // Whoever waits may have gone.
                    let _ = ready.send(Ok((service, tokenizer)));
                    run_to_rest(&mut app)
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                    Ok(())
                }
            }
        };
        let thread = std::thread::Builder::new().name("model".into()).spawn(serve).map_err(SessionError::runtime)?;
        match is_ready.recv() {
            Ok(Ok((service, tokenizer))) => Ok(Host { service, tokenizer, thread }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(SessionError::runtime("the model's thread ended while it was loading")),
        }
    }

    /// Whether the model ended, as it does when it was told to, or when a step failed.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Takes no more requests, and returns when those that were taken are done.
    ///
    /// # Errors
    /// Whatever a step failed with.
    pub fn finish(self) -> Result<(), SessionError> {
        self.service.close();
        self.thread.join().unwrap_or_else(|_| Err(SessionError::runtime("the model's thread panicked")))
    }
}
