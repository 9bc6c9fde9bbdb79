use block::ByteOffset;

/// A blake3 hash over a view's data as it was sent, so that a client can compare what arrived.
///
/// For each stretch of adjacent bytes: its offset (8 bytes, little-endian), its bytes, its length (8 bytes). How the
/// wire cut them into pieces makes no difference.
#[derive(Debug, Default)]
pub struct ViewHash {
    hasher: blake3::Hasher,
    next: u64,
    length: u64,
}

impl ViewHash {
    /// Nothing yet.
    pub fn new() -> ViewHash {
        ViewHash::default()
    }

    /// Takes the next bytes, in the order in which they were sent.
    pub fn update(&mut self, offset: ByteOffset, data: &[u8]) {
        if self.length == 0 || offset.0 != self.next {
            self.close();
            self.hasher.update(&offset.0.to_le_bytes());
        }
        self.hasher.update(data);
        self.next = offset.0 + data.len() as u64;
        self.length += data.len() as u64;
    }

    /// The hash, in hexadecimal digits.
    pub fn finish(mut self) -> String {
        self.close();
        self.hasher.finalize().to_hex().to_string()
    }

    fn close(&mut self) {
        if self.length > 0 {
            self.hasher.update(&self.length.to_le_bytes());
            self.length = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(pieces: &[(u64, &[u8])]) -> String {
        let mut hash = ViewHash::new();
        for (offset, data) in pieces {
            hash.update(ByteOffset(*offset), data);
        }
        hash.finish()
    }

    #[test]
    fn pieces_do_not_matter_but_places_do() {
        let whole = hash(&[(0, b"abcdef"), (100, b"xy")]);
        assert_eq!(whole, hash(&[(0, b"abc"), (3, b"def"), (100, b"x"), (101, b"y")]));
        assert_ne!(whole, hash(&[(0, b"abcdef"), (101, b"xy")]));
        assert_ne!(whole, hash(&[(0, b"abcdef"), (100, b"x")]));
        assert_ne!(whole, hash(&[(0, b"abcdexy")]));
    }
}
