//! The place of [`super::nccl`] in builds without the feature `cuda`: there is no GPU whose tensors NCCL could move.

use std::ops::Range;

use super::{
    Comm,
    collectives::Member,
    exchange::{Meeting, Place, Received},
    launch::{Gpus, Nccl},
    mpi,
};
use crate::{
    error::Result,
    ops::permute::Order,
    stream::{Here, Waited},
    tensor::Tensor,
};

/// A loaded library: there is none.
pub(super) enum Engine {}

const ABSENT: &str = "the build is without the feature `cuda`";

pub(super) fn found(_: &Nccl) -> std::result::Result<String, String> {
    Err(ABSENT.into())
}

pub(super) fn meet(_: &Comm, _: &mpi::Hub, _: &Gpus) -> Result<String> {
    Ok(format!("GPUs meet by the host, over MPI: {ABSENT}"))
}

impl Engine {
    pub fn abort(&self) {
        match *self {}
    }

    pub fn end(&self, _: &mpi::Hub) -> Result<()> {
        match *self {}
    }
}

pub fn all_reduce_at_once(_: &Member<'_>, _: &mut Here<'_>, _: Tensor, _: String) -> Result<bool> {
    Ok(false)
}

pub fn reduce_scatter(_: &Member<'_>, _: &mut Here<'_>, _: Tensor, _: &[Range<usize>], _: String) -> Result<bool> {
    Ok(false)
}

pub fn gather(_: &Member<'_>, _: &mut Here<'_>, _: Tensor, _: &[Range<usize>], _: Option<String>) -> Result<bool> {
    Ok(false)
}

pub fn dispatch(
    _: &Meeting<'_>,
    _: &mut Here<'_>,
    _: &Place,
    _: (Tensor, Tensor),
    _: Order,
    _: Received,
) -> Result<Option<Waited>> {
    Ok(None)
}

pub fn send_rows(
    _: &Meeting<'_>,
    _: &mut Here<'_>,
    _: &Place,
    _: Tensor,
    _: Order,
    _: Received,
    _: Tensor,
) -> Result<Option<Waited>> {
    Ok(None)
}

pub fn return_rows(
    _: &Meeting<'_>,
    _: &mut Here<'_>,
    _: &Place,
    _: Tensor,
    _: Received,
    _: Tensor,
) -> Result<Option<Waited>> {
    Ok(None)
}
