//! Hugging Face folders in and out.
pub mod config;
