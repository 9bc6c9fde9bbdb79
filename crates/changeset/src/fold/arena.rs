use block::BLOCK_BYTES;

const PAGE: usize = BLOCK_BYTES as usize;
/// 4 MiB a chunk: large enough for the kernel's huge pages, small enough to waste little.
const CHUNK_PAGES: usize = 1024;

/// 4 KiB pages in large chunks. A page's content is whatever it last held.
#[derive(Default)]
pub(super) struct Arena {
    chunks: Vec<Box<[u8]>>,
    /// Pages `0..fresh` have been given out since the last clear.
    fresh: u32,
    freed: Vec<u32>,
}

impl Arena {
    pub(super) fn allocate(&mut self) -> u32 {
        if let Some(page) = self.freed.pop() {
            return page;
        }
        let page = self.fresh;
        if page as usize / CHUNK_PAGES == self.chunks.len() {
            self.chunks.push(vec![0; CHUNK_PAGES * PAGE].into_boxed_slice());
        }
        self.fresh = page.checked_add(1).expect("an epoch holds less than 16 TiB of memory");
        page
    }

    pub(super) fn free(&mut self, page: u32) {
        self.freed.push(page);
    }

    pub(super) fn page(&self, page: u32) -> &[u8; PAGE] {
        let (chunk, at) = place(page);
        self.chunks[chunk][at..].first_chunk().expect("chunks are whole pages")
    }

    pub(super) fn page_mut(&mut self, page: u32) -> &mut [u8; PAGE] {
        let (chunk, at) = place(page);
        self.chunks[chunk][at..].first_chunk_mut().expect("chunks are whole pages")
    }

    pub(super) fn pages_used(&self) -> u64 {
        u64::from(self.fresh) - self.freed.len() as u64
    }

    pub(super) fn clear(&mut self) {
        self.fresh = 0;
        self.freed.clear();
    }
}

fn place(page: u32) -> (usize, usize) {
    (page as usize / CHUNK_PAGES, page as usize % CHUNK_PAGES * PAGE)
}
