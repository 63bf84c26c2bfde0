//! Tests of requests to a run.
