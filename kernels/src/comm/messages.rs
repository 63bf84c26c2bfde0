//! Messages from rank to rank, matched by sender, receiver and tag. A send takes a copy and goes on, so the copy is the host's, on GPUs too.

use super::{Comm, Traffic, with_element};
use crate::{
    cost::Cost,
    dtype::{DType, Element, Storage},
    error::{Error, Result},
    memory::Memory,
    stream::{Rendezvous, Stream, Waited},
    tensor::Tensor,
};

impl Comm {
    /// Sends x to rank `to`. A copy is taken when the stream gets here; nothing waits, unless 1024 messages to `to` have not been
    /// received yet.
    pub fn send(&self, s: &mut Stream, x: Tensor, to: u32, tag: u64) -> Result<()> {
        const OP: &str = "send";
        self.expect_peer(OP, to)?;
        let bytes = self.link_bytes(to, x.size_bytes());
        let rendezvous = || Rendezvous::Send { to: self.in_run(to), tag };
        let cost = Cost::stream(0, x.size_bytes(), 0) + bytes.cost();
        self.launch(s, OP, (&[x], &[]), rendezvous, cost, move |comm, hub, here| {
            let nanos = hub.send((comm.in_run(comm.rank), comm.in_run(to)), tag, copy_out(here.host()?, x))?;
            comm.count(Traffic::P2p, bytes, None);
            Ok(Waited { nanos, load: None })
        })
    }

    /// Assigns x from the next message of rank `from` with this tag, and waits for it. One of another length or type is an error.
    pub fn receive(&self, s: &mut Stream, x: Tensor, from: u32, tag: u64) -> Result<()> {
        const OP: &str = "receive";
        self.expect_peer(OP, from)?;
        let rendezvous = || Rendezvous::Receive { from: self.in_run(from), tag };
        let cost = Cost::stream(0, 0, x.size_bytes());
        self.launch(s, OP, (&[], &[x]), rendezvous, cost, move |comm, hub, here| {
            let (data, nanos) = hub.receive((comm.in_run(from), comm.in_run(comm.rank)), tag)?;
            if (data.dtype(), data.len()) != (x.dtype, x.len()) {
                let (dtype, len) = (data.dtype(), data.len());
                let message = format!(
                    "rank {from} sent {dtype:?} of [{len}] under tag {tag}, where rank {} receives {:?} of {:?}",
                    comm.rank, x.dtype, x.shape
                );
                return Err(Error::Comm { op: OP, message });
            }
            copy_in(here.host()?, x, &data);
            Ok(Waited { nanos, load: None })
        })
    }
}

fn copy_out(m: &Memory, x: Tensor) -> Storage {
    match x.dtype {
        DType::F64 => Storage::F64(m.download(x)),
        DType::F32 => Storage::F32(m.download(x)),
        DType::Bf16 => Storage::Bf16(m.download(x)),
        DType::U32 => Storage::U32(m.download(x)),
        DType::U8 => Storage::U8(m.download(x)),
    }
}

fn copy_in(m: &Memory, x: Tensor, data: &Storage) {
    with_element!(x.dtype, T => {
        if let Some(data) = T::slice(data) {
            m.write::<T>(x).copy_from_slice(data);
        }
    });
}
