//! Named tensors in pieces, over several safetensors files: `NAME@OFFSET` holds the elements of the tensor NAME from OFFSET on.
//!
//! Names and offsets are of the whole, so that whoever reads does not see who wrote which piece, and need not be as many. What is
//! read is counted first: each element is there once.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use safetensors::Dtype;

use crate::{
    checkpoint::{Error, io_error},
    tensor_file::{FileElement, read_header},
};

/// The name of the piece of tensor `name` that begins at element `start`.
pub fn piece_name(name: &str, start: usize) -> String {
    format!("{name}@{start}")
}

/// Open files of pieces.
#[derive(Debug)]
pub struct TensorPieces {
    folder: PathBuf,
    files: Vec<(PathBuf, File)>,
    /// By the first element.
    tensors: BTreeMap<String, Vec<Piece>>,
}

#[derive(Clone, Debug)]
struct Piece {
    elements: Range<usize>,
    dtype: Dtype,
    file: usize,
    /// First byte, from the beginning of the file.
    at: u64,
}

impl TensorPieces {
    /// Reads the headers of `folder`'s files `STEM.safetensors` and `STEM-*.safetensors`.
    ///
    /// # Errors
    /// If there is none, or one cannot be read, is damaged or holds something else.
    pub fn open(folder: &Path, stem: &str) -> Result<Self, Error> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
            let name = entry.map_err(io_error("list", folder))?.file_name().to_string_lossy().into_owned();
            let middle = name.strip_prefix(stem).and_then(|rest| rest.strip_suffix(".safetensors"));
            if middle.is_some_and(|middle| middle.is_empty() || middle.starts_with('-')) {
                names.push(name);
            }
        }
        names.sort();
        let mut pieces = TensorPieces { folder: folder.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        if names.is_empty() {
            let reason = format!("it has no {stem}.safetensors and no {stem}-*.safetensors");
            return Err(Error::Damaged { path: folder.to_owned(), reason });
        }
        names.into_iter().try_for_each(|name| pieces.add(folder.join(name)))?;
        pieces.tensors.values_mut().for_each(|pieces| pieces.sort_by_key(|piece| piece.elements.start));
        Ok(pieces)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), Error> {
        let file = File::open(&path).map_err(io_error("read", &path))?;
        let (data_start, header) = read_header(&path, &file)?;
        for key in header.offset_keys() {
            let Some(info) = header.info(&key) else { continue };
            let place = key.rsplit_once('@').and_then(|(name, start)| Some((name, start.parse::<usize>().ok()?)));
            let ([len], Some((name, start))) = (&info.shape[..], place) else {
                let reason = format!("expected pieces NAME@OFFSET of one extent, found `{key}` of {:?}", info.shape);
                return Err(Error::Damaged { path, reason });
            };
            let (elements, at) = (start..start.saturating_add(*len), data_start + info.data_offsets.0 as u64);
            let piece = Piece { elements, dtype: info.dtype, file: self.files.len(), at };
            self.tensors.entry(name.to_owned()).or_default().push(piece);
        }
        self.files.push((path, file));
        Ok(())
    }

    /// Names of whole tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Checks that the pieces of tensor `name` are `dims` in one type, each element once.
    ///
    /// # Errors
    /// Names what is missing or there twice, in elements and in rows of the first extent.
    pub fn check(&self, name: &str, dims: &[usize]) -> Result<(), Error> {
        let len = dims.iter().product::<usize>();
        let error = |found: String| {
            let expected = format!("{dims:?}, each of its {len} elements once");
            Err(Error::Tensor { path: self.folder.clone(), name: name.to_owned(), expected, found })
        };
        let row = (len / dims.first().copied().unwrap_or(1).max(1)).max(1);
        let place = |at: Range<usize>| {
            let rows = at.start / row..at.end.div_ceil(row);
            format!("elements {at:?} (rows {rows:?})")
        };
        let pieces = self.tensors.get(name).map_or(&[][..], Vec::as_slice);
        let mut end = 0;
        for Piece { elements, dtype, file, .. } in pieces.iter().filter(|piece| !piece.elements.is_empty()) {
            let path = self.files[*file].0.display();
            if elements.start > end {
                return error(format!("{} in no file", place(end..elements.start)));
            }
            if elements.start < end {
                return error(format!("{} twice, once in {path}", place(elements.start..end.min(elements.end))));
            }
            if elements.end > len {
                return error(format!("{} beyond its end, in {path}", place(len.max(elements.start)..elements.end)));
            }
            if *dtype != pieces[0].dtype {
                return error(format!("{dtype} in {path}, and {} elsewhere", pieces[0].dtype));
            }
            end = elements.end;
        }
        if end < len {
            return error(format!("{} in no file", place(end..len)));
        }
        Ok(())
    }

    /// The type of tensor `name`, if there is one.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        Some(self.tensors.get(name)?.first()?.dtype)
    }

    /// Some elements of tensor `name`, from whatever files they are in.
    ///
    /// # Errors
    /// If some are in no file or of another type, or cannot be read.
    pub fn read<T: FileElement>(&self, name: &str, elements: Range<usize>) -> Result<Vec<T>, Error> {
        let error = |found: String| {
            let expected = format!("{} {elements:?}", T::DTYPE);
            Error::Tensor { path: self.folder.clone(), name: name.to_owned(), expected, found }
        };
        let mut values = vec![T::zeroed(); elements.len()];
        let mut end = elements.start;
        for piece in self.tensors.get(name).map_or(&[][..], Vec::as_slice) {
            let part = elements.start.max(piece.elements.start)..elements.end.min(piece.elements.end);
            if part.is_empty() {
                continue;
            }
            if piece.dtype != T::DTYPE {
                return Err(error(format!("{}", piece.dtype)));
            }
            if part.start > end {
                break;
            }
            let (path, file) = &self.files[piece.file];
            let at = piece.at + ((part.start - piece.elements.start) * size_of::<T>()) as u64;
            let out = &mut values[part.start - elements.start..part.end - elements.start];
            file.read_exact_at(bytemuck::cast_slice_mut(out), at).map_err(io_error("read", path))?;
            end = part.end;
        }
        if end < elements.end {
            return Err(error(format!("none from element {end} on")));
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
    #![expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what it is about")]

    use super::*;
    use crate::tensor_file::TensorFile;

    /// A folder whose files `x-N.safetensors` hold these pieces of `w` [4, 3], each element its own number.
    fn folder(files: &[&[Range<usize>]]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (i, pieces) in files.iter().enumerate() {
            let values: Vec<Vec<f32>> = pieces.iter().map(|piece| piece.clone().map(|x| x as f32).collect()).collect();
            let mut file = TensorFile::new();
            for (piece, values) in pieces.iter().zip(&values) {
                file.insert(piece_name("w", piece.start), &[piece.len()], values);
            }
            file.write(&dir.path().join(format!("x-{i}.safetensors"))).unwrap();
        }
        dir
    }

    #[test]
    fn any_part_is_read_from_whatever_pieces() {
        for files in [&[&[0..12][..]][..], &[&[5..7, 0..1], &[7..12, 1..5]], &[&[9..12], &[4..9], &[0..4]]] {
            let dir = folder(files);
            let pieces = TensorPieces::open(dir.path(), "x").unwrap();
            pieces.check("w", &[4, 3]).unwrap();
            assert_eq!(pieces.names().collect::<Vec<_>>(), ["w"]);
            for (start, end) in (0..12).flat_map(|start| (start..=12).map(move |end| (start, end))) {
                let expected: Vec<f32> = (start..end).map(|x| x as f32).collect();
                assert_eq!(pieces.read::<f32>("w", start..end).unwrap(), expected);
            }
        }
    }

    #[test]
    fn what_is_missing_or_there_twice_is_named() {
        let cases: [(&[&[Range<usize>]], &str); 5] = [
            (&[&[0..3], &[6..12]], "elements 3..6 (rows 1..2) in no file"),
            (&[&[0..6], &[5..12]], "elements 5..6 (rows 1..2) twice"),
            (&[&[0..6]], "elements 6..12 (rows 2..4) in no file"),
            (&[&[0..12, 12..15]], "elements 12..15 (rows 4..5) beyond its end"),
            (&[&[3..12]], "elements 0..3 (rows 0..1) in no file"),
        ];
        for (files, message) in cases {
            let dir = folder(files);
            let error = TensorPieces::open(dir.path(), "x").unwrap().check("w", &[4, 3]).unwrap_err().to_string();
            assert!(
                error.contains("`w`: expected [4, 3], each of its 12 elements once") && error.contains(message),
                "{error}"
            );
        }
        let dir = folder(&[&[0..3], &[6..12]]);
        let pieces = TensorPieces::open(dir.path(), "x").unwrap();
        assert!(pieces.read::<f32>("w", 2..7).unwrap_err().to_string().contains("none from element 3 on"));
        assert!(pieces.read::<f64>("w", 0..2).unwrap_err().to_string().contains("expected F64 0..2, found F32"));
        assert!(pieces.check("v", &[2]).is_err());
        assert!(TensorPieces::open(dir.path(), "y").unwrap_err().to_string().contains("no y.safetensors"));
    }
}
