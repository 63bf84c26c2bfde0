//! DeepSeek-style mixture-of-experts models as plugins: scene, data, model, routing, pipeline, optimizer, generation.
pub mod data;
pub mod hf;
pub mod model_config;
pub mod params;
pub mod problem;
pub mod scene;
