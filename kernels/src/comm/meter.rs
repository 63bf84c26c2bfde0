//! What a rank put on its links, by class of link and kind of traffic. Plain data, to be taken once a step.
//!
//! Counted is the payload: elements as they are encoded, with the scales of 8-bit formats, without envelopes, counts and indices
//! (`exchange/brought.rs` says how long those are). Ranks that share memory copy nothing, and count what processes would hand to MPI;
//! processes hand over exactly that, and with debug assertions compare the two in each meeting.
//! - Messages: as sent.
//! - Reductions and gathers: each member sends to each other directly what that one needs. A ring moves the same number of
//!   bytes per rank over other links, and so may an MPI library.
//! - Dispatch: as transports do that know of nodes (DeepEP; DeepSeek-V3 technical report, section 3.2.2). Each token goes once to
//!   each other node it has an expert on, and from the rank that it arrives at, the one with the same place in its node, once to
//!   each other rank of that node that it goes to. The first copy is counted at the token's own rank as inter-node, the others
//!   at the rank of arrival as intra-node. Within the token's own node it goes once to each other rank.
//! - Rows sent by row: each where it goes, directly.

use std::ops::{Add, AddAssign};

use crate::cost::Cost;

/// Bytes by class of link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkBytes {
    /// To other ranks of the node.
    pub intra_node: u64,
    /// To other nodes.
    pub inter_node: u64,
}

impl LinkBytes {
    /// As a cost.
    pub fn cost(self) -> Cost {
        Cost::wire(self.intra_node, self.inter_node)
    }
}

impl Add for LinkBytes {
    type Output = LinkBytes;
    fn add(self, o: LinkBytes) -> LinkBytes {
        LinkBytes { intra_node: self.intra_node + o.intra_node, inter_node: self.inter_node + o.inter_node }
    }
}

impl AddAssign for LinkBytes {
    fn add_assign(&mut self, o: LinkBytes) {
        *self = *self + o;
    }
}

impl std::iter::Sum for LinkBytes {
    fn sum<I: Iterator<Item = LinkBytes>>(iter: I) -> LinkBytes {
        iter.fold(LinkBytes::default(), Add::add)
    }
}

/// Kinds of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Messages from rank to rank.
    P2p,
    /// Rows to the ranks of their experts.
    Dispatch,
    /// Rows back from them.
    Combine,
    /// Reductions and gathers.
    Reduce,
}

/// Bytes a rank sent, by kind of traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meter {
    /// Messages from rank to rank.
    pub p2p: LinkBytes,
    /// Rows to the ranks of their experts.
    pub dispatch: LinkBytes,
    /// Rows back from them.
    pub combine: LinkBytes,
    /// Reductions and gathers.
    pub reduce: LinkBytes,
}

impl Meter {
    pub(super) fn of(&mut self, traffic: Traffic) -> &mut LinkBytes {
        match traffic {
            Traffic::P2p => &mut self.p2p,
            Traffic::Dispatch => &mut self.dispatch,
            Traffic::Combine => &mut self.combine,
            Traffic::Reduce => &mut self.reduce,
        }
    }

    /// Over all kinds.
    pub fn total(&self) -> LinkBytes {
        self.p2p + self.dispatch + self.combine + self.reduce
    }
}

impl AddAssign for Meter {
    fn add_assign(&mut self, o: Meter) {
        self.p2p += o.p2p;
        self.dispatch += o.dispatch;
        self.combine += o.combine;
        self.reduce += o.reduce;
    }
}
