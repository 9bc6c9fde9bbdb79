use ::bytes::Bytes;

/// Chunks shorter than this are copied instead of kept.
const SHORT_BYTES: usize = 4096;

/// Bytes that come in chunks. Long chunks are kept as they are, short ones are gathered, so that the cost of keeping
/// them is bounded however they come.
#[derive(Default)]
pub(super) struct Rope {
    pub(super) len: usize,
    chunks: Vec<Bytes>,
    short: Vec<u8>,
}

impl Rope {
    pub(super) fn push(&mut self, chunk: Bytes) {
        self.len += chunk.len();
        if chunk.len() < SHORT_BYTES {
            self.short.extend_from_slice(&chunk);
            return;
        }
        if !self.short.is_empty() {
            self.chunks.push(std::mem::take(&mut self.short).into());
        }
        self.chunks.push(chunk);
    }

    pub(super) fn append_to(&self, bytes: &mut Vec<u8>) {
        bytes.reserve(self.len);
        self.chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
        bytes.extend_from_slice(&self.short);
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.append_to(&mut bytes);
        bytes
    }
}
