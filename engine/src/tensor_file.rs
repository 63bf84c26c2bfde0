//! Named tensors in a safetensors file: what checkpoints are made of.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use bytemuck::Pod;
use half::bf16;
use safetensors::{
    Dtype, SafeTensorError, SafeTensors,
    tensor::{Metadata, View, serialize_to_file},
};

use crate::checkpoint::{Error, io_error};

/// Longest header accepted, in bytes; the limit of the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Reads and checks a safetensors header; returns where the data begins, and the tensors, sorted by offset. Lengths are not
/// trusted: they are checked before they are allocated.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn read_header(path: &Path, file: &File) -> Result<(u64, Metadata), Error> {
    let damaged = |reason: String| Error::Damaged { path: path.to_owned(), reason };
    let file_len = file.metadata().map_err(io_error("read", path))?.len();
    if file_len < 8 {
        return Err(damaged(format!("expected a safetensors file, found only {file_len} bytes")));
    }
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(io_error("read", path))?;
    let header_len = u64::from_le_bytes(length);
    let limit = MAX_HEADER_BYTES.min(file_len - 8);
    if header_len > limit {
        return Err(damaged(format!("the header claims {header_len} bytes, but can have {limit} at most")));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact_at(&mut header, 8).map_err(io_error("read", path))?;
    // Deserializing checks that tensors follow each other without gap or overlap, and have the bytes of their shapes.
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|e| damaged(format!("the safetensors header is invalid: {e}")))?;
    let data_len = file_len - 8 - header_len;
    if metadata.data_len() as u64 != data_len {
        let claimed = metadata.data_len();
        return Err(damaged(format!("the header describes {claimed} bytes of tensors, the file holds {data_len}")));
    }
    Ok((8 + header_len, metadata))
}

/// A type that a tensor file can hold.
pub trait FileElement: Pod {
    /// Its tag in the file.
    const DTYPE: Dtype;
}

macro_rules! file_element {
    ($($type:ty => $dtype:ident),*) => {
        $(impl FileElement for $type {
            const DTYPE: Dtype = Dtype::$dtype;
        })*
    };
}

file_element!(f32 => F32, f64 => F64, bf16 => BF16, u32 => U32, i64 => I64, u64 => U64);

/// Tensors by name, to be written or as read. Those to be written are borrowed.
#[derive(Clone, Debug, Default)]
pub struct TensorFile<'a> {
    tensors: BTreeMap<String, Entry<'a>>,
    metadata: BTreeMap<String, String>,
    /// Where it was read from; for errors.
    path: PathBuf,
}

#[derive(Clone, Debug)]
struct Entry<'a> {
    dtype: Dtype,
    dims: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl View for &Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.dims
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl<'a> TensorFile<'a> {
    /// No tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor of `dims`, row-major.
    ///
    /// # Panics
    /// If `data` is not as long as `dims` say, or the name is taken.
    pub fn insert<T: FileElement>(&mut self, name: impl Into<String>, dims: &[usize], data: &'a [T]) {
        let name = name.into();
        assert_eq!(dims.iter().product::<usize>(), data.len(), "`{name}` of {dims:?}");
        let bytes = Cow::Borrowed(bytemuck::cast_slice(data));
        let old = self.tensors.insert(name.clone(), Entry { dtype: T::DTYPE, dims: dims.to_vec(), bytes });
        assert!(old.is_none(), "there is a tensor `{name}` already");
    }

    /// Adds a text, such as `format: pt`.
    pub fn set_metadata(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.metadata.insert(key.into(), value.into());
    }

    /// The text for `key`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Extents of tensor `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn dims(&self, name: &str) -> Result<&[usize], Error> {
        Ok(&self.entry(name)?.dims)
    }

    /// Elements of tensor `name`, which must have `dims`.
    ///
    /// # Errors
    /// If there is none, or its type or extents differ.
    pub fn get<T: FileElement>(&self, name: &str, dims: &[usize]) -> Result<Vec<T>, Error> {
        let entry = self.entry(name)?;
        if entry.dtype != T::DTYPE || entry.dims != dims {
            return Err(Error::Tensor {
                path: self.path.clone(),
                name: name.to_owned(),
                expected: format!("{} of {dims:?}", T::DTYPE),
                found: format!("{} of {:?}", entry.dtype, entry.dims),
            });
        }
        // Copied as bytes, for those read from a file are not aligned.
        let mut elements = vec![T::zeroed(); entry.bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut::<T, u8>(&mut elements).copy_from_slice(&entry.bytes);
        Ok(elements)
    }

    fn entry(&self, name: &str) -> Result<&Entry<'a>, Error> {
        self.tensors.get(name).ok_or_else(|| Error::Tensor {
            path: self.path.clone(),
            name: name.to_owned(),
            expected: "a tensor of this name".into(),
            found: format!("{} others", self.tensors.len()),
        })
    }

    /// Writes the file, without syncing it: [`crate::checkpoint::fill`] does.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let metadata = self.metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect::<HashMap<_, _>>();
        let metadata = (!metadata.is_empty()).then_some(metadata);
        serialize_to_file(&self.tensors, metadata, path).map_err(|error| match error {
            SafeTensorError::IoError(source) => io_error("write", path)(source),
            other => io_error("write", path)(io::Error::other(other)),
        })
    }

    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is no safetensors file, or holds a type that is not a [`FileElement`].
    pub fn read(path: &Path) -> Result<TensorFile<'static>, Error> {
        let bytes = fs::read(path).map_err(io_error("read", path))?;
        let damaged = |error: SafeTensorError| Error::Damaged { path: path.to_owned(), reason: error.to_string() };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        let views = SafeTensors::deserialize(&bytes).map_err(damaged)?;
        let entry = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let entry =
                Entry { dtype: view.dtype(), dims: view.shape().to_vec(), bytes: Cow::Owned(view.data().to_vec()) };
            (name, entry)
        };
        let tensors = views.tensors().into_iter().map(entry).collect();
        Ok(TensorFile { tensors, metadata, path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn every_type_comes_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let a = [1.5f32, f32::NAN, -0.0, f32::MIN_POSITIVE / 2.0];
        let (b, c) = ([0.1f64], [bf16::from_f32(3.25), bf16::INFINITY]);
        let (d, e) = ([u32::MAX, 0], [u64::MAX]);
        let mut file = TensorFile::new();
        file.insert("a", &[2, 2], &a);
        file.insert("b", &[], &b);
        file.insert("c", &[2, 1], &c);
        file.insert("d", &[2], &d);
        file.insert("e", &[1], &e);
        file.insert("nothing", &[0, 3], &[0f32; 0]);
        file.set_metadata("format", "pt");
        file.write(&path).unwrap();

        let back = TensorFile::read(&path).unwrap();
        assert_eq!(back.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e", "nothing"]);
        assert_eq!(back.metadata("format"), Some("pt"));
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&back.get::<f32>("a", &[2, 2]).unwrap()), bits(&a));
        assert_eq!(back.get::<f64>("b", &[]).unwrap(), b);
        assert_eq!(back.get::<bf16>("c", &[2, 1]).unwrap(), c);
        assert_eq!(back.get::<u32>("d", &[2]).unwrap(), d);
        assert_eq!(back.get::<u64>("e", &[1]).unwrap(), e);
        assert_eq!(back.dims("nothing").unwrap(), [0, 3]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let mut file = TensorFile::new();
        file.insert("w", &[2], &[1f32, 2.0]);
        file.write(&path).unwrap();
        let back = TensorFile::read(&path).unwrap();
        for (error, message) in [
            (back.get::<f64>("w", &[2]).unwrap_err(), "`w`: expected F64 of [2], found F32 of [2]"),
            (back.get::<f32>("w", &[2, 1]).unwrap_err(), "`w`: expected F32 of [2, 1], found F32 of [2]"),
            (back.get::<f32>("v", &[2]).unwrap_err(), "`v`: expected a tensor of this name, found 1 others"),
        ] {
            let error = error.to_string();
            assert!(error.contains("x.safetensors") && error.ends_with(message), "{error}");
        }
        fs::write(&path, b"not tensors").unwrap();
        let error = TensorFile::read(&path).unwrap_err().to_string();
        assert!(error.contains("x.safetensors") && error.contains("damaged"), "{error}");
    }
}
