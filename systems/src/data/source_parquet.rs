//! The string column `text` of a Parquet file, read a row group at a time through the column reader: no Arrow is needed for
//! one column, and leaving it out halves what the feature costs to build.

use std::fs::File;
use std::path::Path;

use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::source::SourceError;

/// Rows decoded at a time.
const ROWS_PER_READ: usize = 1024;

/// Appends the documents of the Parquet file at `path`.
pub(super) fn read_parquet(path: &Path, documents: &mut Vec<String>) -> Result<(), SourceError> {
    let unusable = |found: String| SourceError::Parquet { path: path.to_owned(), found };
    let broken = |error: ParquetError| unusable(error.to_string());
    let file = File::open(path).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let names = || schema.columns().iter().map(|column| column.path().string()).collect::<Vec<_>>().join(", ");
    let (column, description) = schema
        .columns()
        .iter()
        .enumerate()
        .find(|(_, column)| column.path().parts() == ["text"])
        .ok_or_else(|| unusable(format!("the columns {}", names())))?;
    if description.physical_type() != PhysicalType::BYTE_ARRAY || description.max_rep_level() > 0 {
        let repeated = if description.max_rep_level() > 0 { "repeated " } else { "" };
        return Err(unusable(format!("a {repeated}column `text` of type {}", description.physical_type())));
    }
    let mut row = 0;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(broken)?;
        match group.get_column_reader(column).map_err(broken)? {
            ColumnReader::ByteArrayColumnReader(texts) => {
                read_group(path, texts, description.max_def_level(), &mut row, documents)?;
            }
            _ => return Err(unusable("a column reader of another type".to_owned())),
        }
    }
    Ok(())
}

fn read_group(
    path: &Path,
    mut texts: ColumnReaderImpl<ByteArrayType>,
    max_def_level: i16,
    row: &mut usize,
    documents: &mut Vec<String>,
) -> Result<(), SourceError> {
    let (mut levels, mut values): (Vec<i16>, Vec<ByteArray>) = (Vec::new(), Vec::new());
    loop {
        levels.clear();
        values.clear();
        let (num_rows, _, _) = texts
            .read_records(ROWS_PER_READ, Some(&mut levels), None, &mut values)
            .map_err(|error| SourceError::Parquet { path: path.to_owned(), found: error.to_string() })?;
        if num_rows == 0 {
            return Ok(());
        }
        let bad = |offset: usize, found| SourceError::Row { path: path.to_owned(), row: *row + offset, found };
        if let Some(null) = levels.iter().position(|level| *level < max_def_level) {
            return Err(bad(null, "null"));
        }
        for (offset, value) in values.iter().enumerate() {
            let text = std::str::from_utf8(value.data()).map_err(|_| bad(offset, "bytes that are not UTF-8"))?;
            if text.is_empty() {
                return Err(bad(offset, "an empty text"));
            }
            documents.push(text.to_owned());
        }
        *row += num_rows;
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::data_type::Int32Type;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;
    use crate::data::source::read_documents;

    /// Writes row groups of texts (`None` is null) and reads the documents back.
    fn round_trip(schema: &str, groups: &[&[Option<&[u8]>]], compression: Compression) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, properties).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            while let Some(mut column) = group.next_column().unwrap() {
                let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
                let values: Vec<ByteArray> = rows.iter().flatten().map(|bytes| bytes.to_vec().into()).collect();
                match column.untyped() {
                    parquet::column::writer::ColumnWriter::ByteArrayColumnWriter(texts) => {
                        texts.write_batch(&values, Some(&levels), None).unwrap();
                    }
                    _ => {
                        let numbers: Vec<i32> = (0..rows.len() as i32).collect();
                        column.typed::<Int32Type>().write_batch(&numbers, None, None).unwrap();
                    }
                }
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        writer.close().unwrap();
        read_documents(&[path]).map_err(|error| error.to_string().replace(&format!("{}/", dir.path().display()), ""))
    }

    /// A text or null.
    type Row<'a> = Option<&'a [u8]>;

    const SCHEMA: &str = "message m { required int32 id; optional binary text (UTF8); }";

    #[test]
    fn texts_come_in_row_order_over_row_groups_and_reads() {
        let texts: Vec<String> = (0..3 * ROWS_PER_READ).map(|i| format!("text {i} é")).collect();
        let rows: Vec<Option<&[u8]>> = texts.iter().map(|text| Some(text.as_bytes())).collect();
        let (head, tail) = rows.split_at(2 * ROWS_PER_READ + 7);
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())] {
            assert_eq!(round_trip(SCHEMA, &[head, tail], compression).unwrap(), texts);
        }
    }

    #[test]
    fn errors_name_the_row_or_the_columns() {
        let good: &[Row] = &[Some(b"x"), Some(b"y")];
        let cases: [(&str, &[&[Row]], &str); 6] = [
            (
                SCHEMA,
                &[good, &[Some(b"z"), None]],
                "a.parquet, row 3: expected a non-empty UTF-8 string in column `text`, found null",
            ),
            (
                SCHEMA,
                &[good, &[Some(b"\xff")]],
                "row 2: expected a non-empty UTF-8 string in column `text`, found bytes that are not UTF-8",
            ),
            (SCHEMA, &[&[Some(b"")]], "row 0: expected a non-empty UTF-8 string in column `text`, found an empty text"),
            ("message m { required int32 id; required int32 n; }", &[good], "found the columns id, n"),
            ("message m { required int32 text; }", &[good], "found a column `text` of type INT32"),
            (SCHEMA, &[], "expected at least one document"),
        ];
        for (schema, groups, expected) in cases {
            let error = round_trip(schema, groups, Compression::SNAPPY).unwrap_err();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn a_file_that_is_no_parquet_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [&b"PAR1"[..], b"not parquet at all", &[0; 64]] {
            let path = dir.path().join("b.parquet");
            std::fs::write(&path, bytes).unwrap();
            let error = read_documents(&[path]).unwrap_err().to_string();
            assert!(error.contains("b.parquet: expected a Parquet file"), "{error}");
        }
    }
}
