//! The directory of a zip archive, to the extent that numpy's `.npz` files use the format: stored and deflated members, and the
//! 64-bit fields of large archives.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use super::array::INTERRUPTED;
use crate::error::{Error, Kind, Result};

/// A file in the archive.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) name: String,
    /// Whether it is deflated; stored as it is otherwise.
    pub(super) deflated: bool,
    pub(super) crc: u32,
    /// Bytes it takes in the archive.
    pub(super) stored: u64,
    /// Bytes it holds.
    pub(super) size: u64,
    /// Where its bytes start.
    pub(super) offset: u64,
}

impl Member {
    /// Its bytes, decompressed.
    pub(super) fn open(&self, mut archive: File) -> io::Result<Box<dyn Read>> {
        archive.seek(SeekFrom::Start(self.offset))?;
        let bytes = io::BufReader::with_capacity(1 << 16, archive).take(self.stored);
        Ok(if self.deflated { Box::new(flate2::read::DeflateDecoder::new(bytes)) } else { Box::new(bytes) })
    }
}

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_LOCATOR: u32 = 0x0706_4b50;
const ENTRY: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

fn fail(message: impl Into<String>) -> Error {
    Error::new(Kind::Samples, message)
}

fn unreadable(error: io::Error) -> Error {
    fail(format!("cannot read the archive: {error}")).with_source(error)
}

fn damaged() -> Error {
    fail("the archive's directory is damaged").with_hint(INTERRUPTED)
}

/// Members in the order of the directory.
pub(super) fn members(archive: &mut File) -> Result<Vec<Member>> {
    let length = archive.seek(SeekFrom::End(0)).map_err(unreadable)?;
    let tail_start = length.saturating_sub(65_557);
    let tail = read(archive, tail_start, length - tail_start)?;
    let Some(end) = (0..tail.len().saturating_sub(21)).rev().find(|&at| {
        u32_at(&tail, at) == Some(END) && u16_at(&tail, at + 20).map(usize::from) == Some(tail.len() - at - 22)
    }) else {
        let mut start = [0; 6];
        let seen = archive.seek(SeekFrom::Start(0)).and_then(|_| archive.read(&mut start)).unwrap_or(0);
        return Err(match &start[..seen] {
            [] => fail("the file is empty").with_hint(INTERRUPTED),
            [b'P', b'K', 3, 4, ..] => {
                fail("the archive is truncated: its directory, which comes last, is missing").with_hint(INTERRUPTED)
            }
            b"\x93NUMPY" => fail("the file is a single array").with_hint("give it a name that ends in .npy"),
            _ => fail("the file is not a zip archive, which .npz files are"),
        });
    };
    let mut count = u64::from(u16_at(&tail, end + 10).ok_or_else(damaged)?);
    let mut size = u64::from(u32_at(&tail, end + 12).ok_or_else(damaged)?);
    let mut offset = u64::from(u32_at(&tail, end + 16).ok_or_else(damaged)?);
    if count == 0xffff || size == 0xffff_ffff || offset == 0xffff_ffff {
        let locator =
            end.checked_sub(20).filter(|&at| u32_at(&tail, at) == Some(END_64_LOCATOR)).ok_or_else(damaged)?;
        let record = read(archive, u64_at(&tail, locator + 8).ok_or_else(damaged)?, 56)?;
        if u32_at(&record, 0) != Some(END_64) {
            return Err(damaged());
        }
        count = u64_at(&record, 32).ok_or_else(damaged)?;
        size = u64_at(&record, 40).ok_or_else(damaged)?;
        offset = u64_at(&record, 48).ok_or_else(damaged)?;
    }
    if offset.checked_add(size).is_none_or(|end| end > length) {
        return Err(damaged());
    }
    let directory = read(archive, offset, size)?;
    let mut members = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let (member, next) = entry(&directory, at).ok_or_else(damaged)??;
        at = next;
        members.push(member);
    }
    for member in &mut members {
        let header = read(archive, member.offset, 30)?;
        let lengths = u16_at(&header, 26).zip(u16_at(&header, 28)).filter(|_| u32_at(&header, 0) == Some(LOCAL));
        let (name, extra) = lengths.ok_or_else(damaged)?;
        member.offset += 30 + u64::from(name) + u64::from(extra);
        if member.offset.checked_add(member.stored).is_none_or(|end| end > length) {
            return Err(damaged());
        }
        // Deflate packs at most 1032 bytes into one.
        let possible = if member.deflated { member.size / 1032 <= member.stored } else { member.size == member.stored };
        if !possible {
            return Err(damaged());
        }
    }
    Ok(members)
}

/// The directory entry at `at`, still with the offset of its local header, and where the next one starts.
fn entry(directory: &[u8], at: usize) -> Option<Result<(Member, usize)>> {
    let u16_at = |offset| u16_at(directory, at + offset);
    let u32_at = |offset| u32_at(directory, at + offset);
    if u32_at(0)? != ENTRY {
        return None;
    }
    let name_end = at + 46 + usize::from(u16_at(28)?);
    let extra_end = name_end + usize::from(u16_at(30)?);
    let name = String::from_utf8_lossy(directory.get(at + 46..name_end)?).into_owned();
    if u16_at(8)? & 1 == 1 {
        return Some(Err(fail(format!("\"{name}\" is encrypted"))));
    }
    let deflated = match u16_at(10)? {
        0 => false,
        8 => true,
        method => {
            return Some(Err(fail(format!("\"{name}\" is compressed by method {method}; numpy uses 8, deflate"))));
        }
    };
    let mut fields = [u32_at(24)?, u32_at(20)?, u32_at(42)?].map(u64::from);
    let mut extra = directory.get(name_end..extra_end)?;
    while let Some(length) = self::u16_at(extra, 2).map(usize::from) {
        if self::u16_at(extra, 0) == Some(1) {
            let wide = fields.iter_mut().filter(|f| **f == 0xffff_ffff);
            for (position, field) in wide.enumerate() {
                *field = u64_at(extra, 4 + 8 * position)?;
            }
            break;
        }
        extra = extra.get(4 + length..)?;
    }
    let [size, stored, offset] = fields;
    let member = Member { name, deflated, crc: u32_at(16)?, stored, size, offset };
    Some(Ok((member, extra_end + usize::from(u16_at(32)?))))
}

fn read(file: &mut File, offset: u64, length: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(offset)).and_then(|_| file.take(length).read_to_end(&mut bytes)).map_err(unreadable)?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
