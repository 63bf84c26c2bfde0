//! The one device: its memory, and all that handles stand for.

use std::{cell::Cell, collections::BTreeMap, sync::Arc, time::Duration};

use ptxsim::{Machine, Module, Stats as Ran};

use crate::{
    errors::{
        INVALID_HANDLE, INVALID_PTX, INVALID_VALUE, LAUNCH_OUT_OF_RESOURCES, NO_BINARY_FOR_GPU, NOT_FOUND,
        OUT_OF_MEMORY, Outcome, UNSUPPORTED_PTX_VERSION,
    },
    queue::{HostBytes, KernelLaunch, Mark, Op, Queue},
    settings::Settings,
};

/// Shared memory of a block without asking, and the most that a kernel may ask for.
const SHARED_BYTES: (u32, u32) = (48 << 10, 227 << 10);

/// The one context's handle.
pub(crate) const CONTEXT: usize = 0xC0DE;

thread_local! {
    /// The thread's current context, 0 for none.
    pub(crate) static CURRENT: Cell<usize> = const { Cell::new(0) };
    /// Captures that the thread has begun in a mode that forbids calls which may wait.
    pub(crate) static CAPTURES: Cell<usize> = const { Cell::new(0) };
}

/// An entry of a module.
pub(crate) struct Function {
    pub(crate) module: Module,
}

pub(crate) struct Event {
    timing: bool,
    /// Its last record.
    pub(crate) mark: Option<Mark>,
}

/// What ran, by kernel.
#[derive(Default)]
pub(crate) struct Stats {
    kernels: BTreeMap<String, (u64, u64, Duration)>,
    /// Launches of graphs.
    pub(crate) graphs: u64,
    /// Kernels that these came to.
    pub(crate) in_graphs: u64,
}

impl Stats {
    pub(crate) fn count(&mut self, name: &str, took: Duration, ran: &Result<Ran, String>) {
        let of = self.kernels.entry(name.to_owned()).or_default();
        of.0 += 1;
        of.1 += ran.as_ref().map_or(0, |ran| ran.thread_instructions);
        of.2 += took;
    }

    pub(crate) fn tell(&self) {
        for (name, (launches, instructions, took)) in &self.kernels {
            eprintln!("ptxsim: {launches} x {name}: {instructions} thread instructions, {:.3} s", took.as_secs_f64());
        }
        eprintln!("ptxsim: {} graphs of {} kernels", self.graphs, self.in_graphs);
    }
}

pub(crate) struct Gpu {
    pub(crate) settings: Settings,
    pub(crate) initialized: bool,
    pub(crate) poisoned: bool,
    pub(crate) machine: Machine,
    allocations: BTreeMap<u64, u64>,
    pub(crate) used_bytes: u64,
    pinned: BTreeMap<usize, Box<[u64]>>,
    /// Pinned memory that kernels see: the device's address of it, and its words.
    mapped: BTreeMap<usize, (u64, usize)>,
    pub(crate) queues: BTreeMap<u64, Queue>,
    pub(crate) num_pending: usize,
    events: BTreeMap<u64, Event>,
    modules: BTreeMap<u64, Arc<Function>>,
    /// Dynamic shared memory that functions, which are their modules, may have.
    shared_limits: BTreeMap<u64, u32>,
    pub(crate) graphs: BTreeMap<u64, Arc<Vec<Op>>>,
    pub(crate) graph_execs: BTreeMap<u64, Arc<Vec<Op>>>,
    next_handle: u64,
    pub(crate) random: u64,
    pub(crate) stats: Stats,
}

impl Gpu {
    pub(crate) fn new() -> Self {
        let settings = Settings::read();
        if settings.stats {
            crate::api::tell_at_exit();
        }
        Gpu {
            initialized: false,
            poisoned: false,
            machine: Machine::new(settings.seed),
            allocations: BTreeMap::new(),
            used_bytes: 0,
            pinned: BTreeMap::new(),
            mapped: BTreeMap::new(),
            // The default stream.
            queues: BTreeMap::from([(0, Queue::default())]),
            num_pending: 0,
            events: BTreeMap::new(),
            modules: BTreeMap::new(),
            shared_limits: BTreeMap::new(),
            graphs: BTreeMap::new(),
            graph_execs: BTreeMap::new(),
            next_handle: 0x5EED_0000,
            random: settings.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            stats: Stats::default(),
            settings,
        }
    }

    pub(crate) fn handle(&mut self) -> u64 {
        self.next_handle += 16;
        self.next_handle
    }

    pub(crate) fn queue(&mut self, stream: u64) -> Outcome<&mut Queue> {
        self.queues.get_mut(&stream).ok_or(INVALID_HANDLE)
    }

    // Memory.

    pub(crate) fn alloc(&mut self, bytes: u64) -> Outcome<u64> {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if self.used_bytes + bytes > self.settings.memory_bytes {
            return Err(OUT_OF_MEMORY);
        }
        let address = self.machine.alloc(bytes);
        self.allocations.insert(address, bytes);
        self.used_bytes += bytes;
        Ok(address)
    }

    /// Waits for all work, as the driver does.
    pub(crate) fn free(&mut self, address: u64) -> Outcome {
        self.drain()?;
        let bytes = self.allocations.remove(&address).ok_or(INVALID_VALUE)?;
        self.used_bytes -= bytes;
        self.machine.free(address).map_err(|_| INVALID_VALUE)
    }

    /// `Err` unless the bytes are within one allocation.
    pub(crate) fn inside(&self, address: u64, len: usize) -> Outcome {
        let found = self.allocations.range(..=address).next_back();
        let fits = found.is_some_and(|(start, bytes)| address + len as u64 <= start + bytes);
        if fits || len == 0 { Ok(()) } else { Err(INVALID_VALUE) }
    }

    pub(crate) fn alloc_pinned(&mut self, bytes: usize, mapped: bool) -> Outcome<usize> {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let block = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
        let at = block.as_ptr() as usize;
        if mapped {
            self.mapped.insert(at, (self.machine.alloc(8 * block.len() as u64), block.len()));
        }
        self.pinned.insert(at, block);
        Ok(at)
    }

    /// The device's address of pinned memory that it sees.
    pub(crate) fn mapped(&self, at: usize) -> Outcome<u64> {
        self.mapped.get(&at).map(|(address, _)| *address).ok_or(INVALID_VALUE)
    }

    /// Around a kernel: before it, the device sees what the host wrote; after it, the host sees what the kernel did.
    pub(crate) fn share_mapped<T>(&mut self, run: impl FnOnce(&mut Machine) -> T) -> T {
        let mut before = Vec::new();
        for (&at, &(address, len)) in &self.mapped {
            // SAFETY: the memory is ours; the host may write it at the same time, word by word, as on a device.
            let words: Vec<u64> = (0..len).map(|i| unsafe { (at as *const u64).add(i).read_volatile() }).collect();
            let _ = self.machine.write(address, &words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>());
            before.push((at, address, words));
        }
        let result = run(&mut self.machine);
        for (at, address, words) in before {
            for (i, old) in words.into_iter().enumerate() {
                let mut now = [0; 8];
                let _ = self.machine.read(address + 8 * i as u64, &mut now);
                if u64::from_ne_bytes(now) != old {
                    // SAFETY: as above.
                    unsafe { (at as *mut u64).add(i).write_volatile(u64::from_ne_bytes(now)) };
                }
            }
        }
        result
    }

    pub(crate) fn free_pinned(&mut self, at: usize) -> Outcome {
        self.drain()?;
        if let Some((address, _)) = self.mapped.remove(&at) {
            self.machine.free(address).map_err(|_| INVALID_VALUE)?;
        }
        self.pinned.remove(&at).map(|_| ()).ok_or(INVALID_VALUE)
    }

    fn is_pinned(&self, at: usize, len: usize) -> bool {
        let found = self.pinned.range(..=at).next_back();
        found.is_some_and(|(start, block)| at + len <= start + 8 * block.len())
    }

    /// # Safety
    /// `from` has `len` bytes; pinned ones stay until the stream has done its work.
    pub(crate) unsafe fn copy_to_device(&mut self, to: u64, from: *const u8, len: usize, stream: u64) -> Outcome {
        self.inside(to, len)?;
        let from = if self.is_pinned(from as usize, len) {
            HostBytes::Pinned(from as usize, len)
        } else {
            // SAFETY: the caller's promise.
            HostBytes::Copied(unsafe { std::slice::from_raw_parts(from, len) }.into())
        };
        self.enqueue(stream, Op::ToDevice { to, from })
    }

    /// # Safety
    /// As for [`Gpu::copy_to_device`].
    pub(crate) unsafe fn copy_to_host(&mut self, to: *mut u8, from: u64, len: usize, stream: u64) -> Outcome {
        self.inside(from, len)?;
        if self.is_pinned(to as usize, len) {
            return self.enqueue(stream, Op::ToHost { to: to as usize, from, len });
        }
        // Pageable memory: the call returns when the bytes are there.
        self.drain_stream(stream)?;
        // SAFETY: the caller's promise.
        let to = unsafe { std::slice::from_raw_parts_mut(to, len) };
        self.machine.read(from, to).map_err(|_| INVALID_VALUE)
    }

    // Streams and events.

    pub(crate) fn new_stream(&mut self) -> u64 {
        let id = self.handle();
        self.queues.insert(id, Queue::default());
        id
    }

    pub(crate) fn drop_stream(&mut self, stream: u64) -> Outcome {
        if stream == 0 {
            return Err(INVALID_HANDLE);
        }
        self.drain_stream(stream)?;
        self.queues.remove(&stream);
        Ok(())
    }

    pub(crate) fn new_event(&mut self, timing: bool) -> u64 {
        let id = self.handle();
        self.events.insert(id, Event { timing, mark: None });
        id
    }

    pub(crate) fn drop_event(&mut self, event: u64) -> Outcome {
        self.events.remove(&event).map(|_| ()).ok_or(INVALID_HANDLE)
    }

    pub(crate) fn event(&self, event: u64) -> Outcome<&Event> {
        self.events.get(&event).ok_or(INVALID_HANDLE)
    }

    pub(crate) fn record(&mut self, event: u64, stream: u64) -> Outcome {
        let mark = Mark::default();
        self.events.get_mut(&event).ok_or(INVALID_HANDLE)?.mark = Some(mark.clone());
        self.enqueue(stream, Op::Record(mark))
    }

    /// A record that is a node of the graph which the stream captures, and counts each time the graph comes to it.
    pub(crate) fn record_inside(&mut self, event: u64, stream: u64) -> Outcome {
        self.event(event)?;
        if self.queue(stream)?.capture.is_none() {
            return Err(INVALID_VALUE);
        }
        self.enqueue(stream, Op::RecordInside(event))
    }

    /// An event is as if recorded just now, and that was reached. Until then its record before counts: when that of a graph on its way
    /// begins to count, the manual leaves open, so nothing may depend on it.
    pub(crate) fn reach(&mut self, event: u64, mark: Mark) -> Result<(), String> {
        let event = self.events.get_mut(&event).ok_or("a graph records an event that was destroyed")?;
        event.mark = Some(mark);
        Ok(())
    }

    /// Of the event's last record until now; an event that was never recorded holds nobody up.
    pub(crate) fn wait(&mut self, stream: u64, event: u64) -> Outcome {
        let mark = self.event(event)?.mark.clone();
        self.queue(stream)?;
        mark.map_or(Ok(()), |mark| self.enqueue(stream, Op::Wait(mark)))
    }

    pub(crate) fn elapsed_ms(&self, start: u64, end: u64) -> Outcome<f32> {
        let [start, end] = [self.event(start)?, self.event(end)?];
        if !start.timing || !end.timing {
            return Err(INVALID_HANDLE);
        }
        let when = |event: &Event| {
            let mark = event.mark.as_ref().ok_or(INVALID_HANDLE)?;
            mark.get().copied().ok_or(crate::errors::NOT_READY)
        };
        let (start, end) = (when(start)?, when(end)?);
        let forward = end.saturating_duration_since(start).as_secs_f64();
        Ok(((forward - start.saturating_duration_since(end).as_secs_f64()) * 1e3) as f32)
    }

    // Modules.

    /// The module's handle, or the code with what a compiler would say.
    pub(crate) fn load(&mut self, text: &str) -> Result<u64, (u32, String)> {
        let word = |directive: &str| {
            text.lines()
                .find_map(|line| line.trim().strip_prefix(directive))
                .map(|rest| rest.trim().trim_end_matches(';'))
        };
        let version = word(".version").unwrap_or("");
        // The grammar that the driver knows: 8.0 came with 12.0.
        let known = 80 + (self.settings.driver % 1000) / 10;
        let asked =
            version.split_once('.').and_then(|(a, b)| Some(a.parse::<i32>().ok()? * 10 + b.parse::<i32>().ok()?));
        if asked.is_none_or(|asked| asked > known) {
            return Err((
                UNSUPPORTED_PTX_VERSION,
                format!("Unsupported .version {version}; current version is {known}"),
            ));
        }
        let target = word(".target").and_then(|t| t.split(',').next()).unwrap_or("").trim();
        let (major, minor) = self.settings.compute;
        let own = major * 10 + minor;
        let fits = match target.strip_prefix("sm_") {
            Some(sm) if sm.ends_with('a') => sm.trim_end_matches('a').parse() == Ok(own),
            Some(sm) => sm.parse().is_ok_and(|sm: i32| sm <= own),
            None => false,
        };
        if !fits {
            return Err((NO_BINARY_FOR_GPU, format!("{target} cannot be compiled for this device, sm_{own}")));
        }
        if !text.is_ascii() {
            return Err((INVALID_PTX, "Unexpected non-ASCII character".into()));
        }
        let module = Module::parse(text).map_err(|e| (INVALID_PTX, format!("ptxas application ptx input: {e}")))?;
        if self.settings.refuse.as_ref().is_some_and(|refused| module.name().contains(refused)) {
            return Err((
                INVALID_PTX,
                format!("ptxas fatal   : `{}` is refused, as PTXSIM_REFUSE asks", module.name()),
            ));
        }
        let id = self.handle();
        self.modules.insert(id, Arc::new(Function { module }));
        Ok(id)
    }

    /// A module has one entry, so a function's handle is its module's.
    pub(crate) fn function(&self, module: u64, name: &str) -> Outcome<u64> {
        let found = self.modules.get(&module).ok_or(INVALID_HANDLE)?;
        if found.module.name() == name { Ok(module) } else { Err(NOT_FOUND) }
    }

    pub(crate) fn unload(&mut self, module: u64) -> Outcome {
        self.drain()?;
        self.modules.remove(&module).map(|_| ()).ok_or(INVALID_HANDLE)
    }

    pub(crate) fn allow_shared(&mut self, function: u64, bytes: u32) -> Outcome {
        self.modules.get(&function).ok_or(INVALID_HANDLE)?;
        if bytes > SHARED_BYTES.1 {
            return Err(INVALID_VALUE);
        }
        self.shared_limits.insert(function, bytes);
        Ok(())
    }

    /// # Safety
    /// `params` has an address for each of the function's parameters.
    pub(crate) unsafe fn launch(
        &mut self,
        function: u64,
        (grid, block): ([u32; 3], [u32; 3]),
        shared_bytes: u32,
        stream: u64,
        params: *const *const u8,
    ) -> Outcome {
        let found = self.modules.get(&function).ok_or(INVALID_HANDLE)?.clone();
        let threads = block.iter().product::<u32>();
        let bad_grid = grid.contains(&0) || grid[1] > 65535 || grid[2] > 65535 || grid[0] > i32::MAX as u32;
        if bad_grid || threads == 0 || threads > 1024 || block[2] > 64 {
            return Err(INVALID_VALUE);
        }
        if shared_bytes > self.shared_limits.get(&function).copied().unwrap_or(SHARED_BYTES.0).max(SHARED_BYTES.0) {
            return Err(LAUNCH_OUT_OF_RESOURCES);
        }
        let sizes = found.module.param_sizes();
        if params.is_null() && !sizes.is_empty() {
            return Err(INVALID_VALUE);
        }
        let mut copied = Vec::with_capacity(sizes.len());
        for (i, size) in sizes.iter().enumerate() {
            // SAFETY: the caller's promise; a driver copies what the parameters' sizes say.
            copied.push(unsafe { std::slice::from_raw_parts(*params.add(i), *size) }.to_vec());
        }
        let launch = KernelLaunch { function: found, grid, block, shared_bytes, params: copied };
        self.enqueue(stream, Op::Launch(Arc::new(launch)))
    }
}
