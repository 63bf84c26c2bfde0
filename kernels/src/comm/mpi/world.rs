//! This process among those of its launcher: MPI, started, and requests that own what they read and write.

use std::{
    ffi::{c_char, c_int, c_void},
    mem::{forget, take},
    ptr,
    sync::{Arc, OnceLock},
};

use super::abi::{Functions, Handle};
use crate::{
    comm::watch::Watch,
    dtype::Storage,
    error::{Error, Result},
};

/// MPI, started.
pub struct World {
    functions: Functions,
    /// This process.
    pub rank: u32,
    /// Processes.
    pub num_ranks: u32,
    /// Bytes of a message or of a round, at most: MPI counts in 32 bits.
    pub max_piece: usize,
    watch: OnceLock<Arc<Watch>>,
}

/// Bytes under way. A request that is let go before it is done keeps its memory for ever, because the library may still reach for it.
pub struct Request {
    /// Those that are under way.
    handles: Vec<Handle>,
    sent: Storage,
    received: Storage,
    counts: Vec<c_int>,
}

impl Request {
    fn new(sent: Storage, received: Storage) -> Self {
        Request { handles: Vec::new(), sent, received, counts: Vec::new() }
    }

    /// One that was never made, and is never done.
    fn forgotten(mut self) -> Self {
        self.handles.push(0);
        self
    }

    /// What came; once.
    ///
    /// # Panics
    /// If the request is not done: the library may still write there.
    pub fn take_received(&mut self) -> Storage {
        assert!(self.handles.is_empty(), "what came is taken from a request that is done");
        std::mem::replace(&mut self.received, Storage::U8(Vec::new()))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.handles.is_empty() {
            forget(std::mem::replace(&mut self.sent, Storage::U8(Vec::new())));
            forget(std::mem::replace(&mut self.received, Storage::U8(Vec::new())));
            forget(take(&mut self.counts));
        }
    }
}

/// A count of bytes, as MPI's functions take one.
fn count(len: usize) -> c_int {
    c_int::try_from(len).expect("callers cut what is longer than 2 GiB")
}

impl World {
    /// MPI as it was loaded, which can say its version.
    pub fn unstarted(functions: Functions) -> Self {
        World { functions, rank: 0, num_ranks: 1, max_piece: 1 << 30, watch: OnceLock::new() }
    }

    /// Starts MPI; once in a process.
    ///
    /// # Errors
    /// If the library fails, or does not let several threads call it.
    pub fn start(functions: Functions) -> Result<Self> {
        let mut world = Self::unstarted(functions);
        let f = &world.functions;
        let (mut level, mut rank, mut size) = (0, 0, 0);
        // SAFETY: MPI allows no arguments here, and the results are written to places of this frame.
        let code = unsafe { (f.Init_thread)(ptr::null_mut(), ptr::null_mut(), f.thread_multiple, &mut level) };
        world.check("MPI_Init_thread", code)?;
        if level < f.thread_multiple {
            let message = format!(
                "expected {} to let several threads call it (MPI_THREAD_MULTIPLE), found level {level}; use a library that was \
                 built with threads",
                f.path.display()
            );
            return Err(Error::Comm { op: "MPI_Init_thread", message });
        }
        // SAFETY: the handles are this library's own.
        let codes = unsafe {
            [
                (f.Comm_set_errhandler)(f.world, f.errors_return),
                (f.Comm_rank)(f.world, &mut rank),
                (f.Comm_size)(f.world, &mut size),
            ]
        };
        for (name, code) in ["MPI_Comm_set_errhandler", "MPI_Comm_rank", "MPI_Comm_size"].into_iter().zip(codes) {
            world.check(name, code)?;
        }
        (world.rank, world.num_ranks) = (rank as u32, size as u32);
        Ok(world)
    }

    /// Nothing moves any more once this rank's link is cut.
    pub fn obey(&self, watch: &Arc<Watch>) {
        let _already = self.watch.set(watch.clone());
    }

    fn is_cut(&self) -> bool {
        self.watch.get().is_some_and(|watch| watch.is_cut())
    }

    /// The other processes.
    pub fn others(&self) -> impl Iterator<Item = u32> + use<> {
        let me = self.rank;
        (0..self.num_ranks).filter(move |&rank| rank != me)
    }

    /// The library's name and version, in one line.
    pub fn version(&self) -> String {
        let mut text = vec![0 as c_char; 1 << 15];
        let mut len = 0;
        // SAFETY: no library's text is longer than MPI_MAX_LIBRARY_VERSION_STRING, 8192 at most.
        let code = unsafe { (self.functions.Get_library_version)(text.as_mut_ptr(), &mut len) };
        let text = if code == 0 { line(&text) } else { "of unknown version".into() };
        format!("{text} ({}, {:?} ABI)", self.functions.path.display(), self.functions.abi)
    }

    fn check(&self, op: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut text = vec![0 as c_char; 1 << 13];
        let mut len = 0;
        // SAFETY: no message is longer than MPI_MAX_ERROR_STRING, 1024 at most.
        let known = unsafe { (self.functions.Error_string)(code, text.as_mut_ptr(), &mut len) } == 0;
        let text = if known { line(&text) } else { String::new() };
        Err(Error::Comm { op, message: format!("rank {} of {}: error {code}: {text}", self.rank, self.num_ranks) })
    }

    /// A communicator of all, for one purpose. Collective.
    pub fn duplicate(&self) -> Result<Handle> {
        let mut new = 0;
        // SAFETY: handles are this library's own, and `new` is as wide as the widest.
        let code = unsafe { (self.functions.Comm_dup)(self.functions.world, &mut new) };
        self.check("MPI_Comm_dup", code)?;
        self.report_errors(new)
    }

    /// A communicator of some, in this order. Collective among them, who give the same tag.
    pub fn group(&self, ranks: &[u32], tag: u16) -> Result<Handle> {
        let f = &self.functions;
        let ranks: Vec<c_int> = ranks.iter().map(|&rank| rank as c_int).collect();
        let (mut all, mut some, mut new) = (0, 0, 0);
        // SAFETY: as above; the list is as long as it is said to be.
        unsafe {
            self.check("MPI_Comm_group", (f.Comm_group)(f.world, &mut all))?;
            self.check("MPI_Group_incl", (f.Group_incl)(all, count(ranks.len()), ranks.as_ptr(), &mut some))?;
            self.check("MPI_Comm_create_group", (f.Comm_create_group)(f.world, some, c_int::from(tag), &mut new))?;
        }
        self.report_errors(new)
    }

    fn report_errors(&self, comm: Handle) -> Result<Handle> {
        // SAFETY: both handles are this library's own.
        let code = unsafe { (self.functions.Comm_set_errhandler)(comm, self.functions.errors_return) };
        self.check("MPI_Comm_set_errhandler", code).map(|()| comm)
    }

    /// Starts to send, in pieces that MPI can count.
    pub fn send(&self, comm: Handle, to: u32, tag: u16, data: Storage) -> Result<Request> {
        let mut request = Request::new(data, Storage::U8(Vec::new()));
        if self.is_cut() {
            return Ok(request.forgotten());
        }
        for piece in bytes(&request.sent).chunks(self.max_piece) {
            let (at, len, mut handle) = (piece.as_ptr().cast(), count(piece.len()), 0);
            let f = &self.functions;
            // SAFETY: the request owns the bytes until it is done.
            let code = unsafe { (f.Isend)(at, len, f.byte, to as c_int, c_int::from(tag), comm, &mut handle) };
            self.check("MPI_Isend", code)?;
            request.handles.push(handle);
        }
        Ok(request)
    }

    /// Starts to receive what is as long, in the same pieces.
    pub fn receive(&self, comm: Handle, from: u32, tag: u16, into: Storage) -> Result<Request> {
        let mut request = Request::new(Storage::U8(Vec::new()), into);
        if self.is_cut() {
            return Ok(request.forgotten());
        }
        for piece in bytes_mut(&mut request.received).chunks_mut(self.max_piece) {
            let (at, len, mut handle) = (piece.as_mut_ptr().cast(), count(piece.len()), 0);
            let f = &self.functions;
            // SAFETY: the request owns the place until it is done.
            let code = unsafe { (f.Irecv)(at, len, f.byte, from as c_int, c_int::from(tag), comm, &mut handle) };
            self.check("MPI_Irecv", code)?;
            request.handles.push(handle);
        }
        Ok(request)
    }

    /// Starts to send each member its `each` bytes of `data`, and to receive as many from each.
    pub fn all_to_all(&self, comm: Handle, data: Vec<u8>, each: usize) -> Result<Request> {
        let received = vec![0; data.len()];
        let mut request = Request::new(Storage::U8(data), Storage::U8(received));
        if self.is_cut() {
            return Ok(request.forgotten());
        }
        let to = bytes_mut(&mut request.received).as_mut_ptr().cast();
        let from: *const c_void = bytes(&request.sent).as_ptr().cast();
        let (byte, mut handle) = (self.functions.byte, 0);
        // SAFETY: the request owns both until it is done; both have `each` bytes for every member.
        let code =
            unsafe { (self.functions.Ialltoall)(from, count(each), byte, to, count(each), byte, comm, &mut handle) };
        self.check("MPI_Ialltoall", code)?;
        request.handles.push(handle);
        Ok(request)
    }

    /// Starts to send each member its part of `data`, and to receive from each so much: parts of so many bytes, one after the other.
    pub fn all_to_all_v(&self, comm: Handle, data: Vec<u8>, to: &[usize], from: &[usize]) -> Result<Request> {
        let mut request = Request::new(Storage::U8(data), Storage::U8(vec![0; from.iter().sum()]));
        let n = to.len();
        for list in [to, from] {
            request.counts.extend(list.iter().map(|&len| count(len)));
            request.counts.extend(list.iter().scan(0, |at, &len| Some(count(std::mem::replace(at, *at + len)))));
        }
        if self.is_cut() {
            return Ok(request.forgotten());
        }
        assert_eq!(bytes(&request.sent).len(), to.iter().sum::<usize>(), "parts add up to what is sent");
        let (out, into) = (start(bytes(&request.sent)), start_mut(bytes_mut(&mut request.received)));
        let (byte, counts, mut handle) = (self.functions.byte, request.counts.as_ptr(), 0);
        // SAFETY: the request owns data, place and the four lists of n numbers until it is done.
        let code = unsafe {
            (self.functions.Ialltoallv)(
                out,
                counts,
                counts.add(n),
                byte,
                into,
                counts.add(2 * n),
                counts.add(3 * n),
                byte,
                comm,
                &mut handle,
            )
        };
        self.check("MPI_Ialltoallv", code)?;
        request.handles.push(handle);
        Ok(request)
    }

    /// Whether it is done; this is also when the library gets on with it.
    pub fn is_done(&self, request: &mut Request) -> Result<bool> {
        if self.is_cut() {
            return Ok(false);
        }
        while let Some(handle) = request.handles.last_mut() {
            let mut flag = 0;
            // SAFETY: the handle is that of a request that is under way.
            let code = unsafe { (self.functions.Test)(handle, &mut flag, self.functions.no_status) };
            self.check("MPI_Test", code)?;
            if flag == 0 {
                return Ok(false);
            }
            request.handles.pop();
        }
        Ok(true)
    }

    /// Takes back a receive that nothing will come for.
    pub fn cancel(&self, mut request: Request) -> Result<()> {
        while let Some(handle) = request.handles.last_mut() {
            // SAFETY: the handle is that of a request that is under way; a wait for one that is cancelled ends.
            unsafe {
                self.check("MPI_Cancel", (self.functions.Cancel)(handle))?;
                self.check("MPI_Wait", (self.functions.Wait)(handle, self.functions.no_status))?;
            }
            request.handles.pop();
        }
        Ok(())
    }

    /// Ends MPI, when no request is under way. All ranks do.
    pub fn finish(&self) -> Result<()> {
        // SAFETY: no call follows.
        let code = unsafe { (self.functions.Finalize)() };
        self.check("MPI_Finalize", code)
    }
}

/// Where bytes begin. An empty list's own address is 1, which is how MPI says `MPI_IN_PLACE`.
fn start(bytes: &[u8]) -> *const c_void {
    if bytes.is_empty() { ptr::dangling::<u64>().cast() } else { bytes.as_ptr().cast() }
}

fn start_mut(bytes: &mut [u8]) -> *mut c_void {
    if bytes.is_empty() { ptr::dangling_mut::<u64>().cast() } else { bytes.as_mut_ptr().cast() }
}

/// The first line of a text that ends with a 0.
fn line(text: &[c_char]) -> String {
    let bytes: Vec<u8> = text.iter().map(|&c| c as u8).take_while(|&c| c != 0 && c != b'\n').collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// As bytes.
pub fn bytes(data: &Storage) -> &[u8] {
    match data {
        Storage::F64(v) => bytemuck::cast_slice(v),
        Storage::F32(v) => bytemuck::cast_slice(v),
        Storage::Bf16(v) => bytemuck::cast_slice(v),
        Storage::U32(v) => bytemuck::cast_slice(v),
        Storage::U8(v) => v,
    }
}

fn bytes_mut(data: &mut Storage) -> &mut [u8] {
    match data {
        Storage::F64(v) => bytemuck::cast_slice_mut(v),
        Storage::F32(v) => bytemuck::cast_slice_mut(v),
        Storage::Bf16(v) => bytemuck::cast_slice_mut(v),
        Storage::U32(v) => bytemuck::cast_slice_mut(v),
        Storage::U8(v) => v,
    }
}
