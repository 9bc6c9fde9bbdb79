//! A sparse file's content in memory: pages shared until written, so that a simulated crash copies little.

use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: u64 = 4096;

#[derive(Clone, Debug, Default)]
pub(crate) struct Pages {
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
    length: u64,
}

impl Pages {
    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> usize {
        let count = self.length.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let step = (PAGE as usize - within).min(count - done);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => buffer[done..done + step].copy_from_slice(&page[within..within + step]),
                None => buffer[done..done + step].fill(0),
            }
            done += step;
        }
        count
    }

    pub(crate) fn write(&mut self, mut data: &[u8], mut offset: u64) {
        self.length = self.length.max(offset + data.len() as u64);
        while !data.is_empty() {
            let within = (offset % PAGE) as usize;
            let step = (PAGE as usize - within).min(data.len());
            let page = self.pages.entry(offset / PAGE).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[within..within + step].copy_from_slice(&data[..step]);
            data = &data[step..];
            offset += step as u64;
        }
    }

    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.length.next_multiple_of(PAGE));
        if offset >= end {
            return;
        }
        let touched: Vec<u64> =
            self.pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|(index, _)| *index).collect();
        for index in touched {
            let start = offset.saturating_sub(index * PAGE).min(PAGE) as usize;
            let stop = (end - index * PAGE).min(PAGE) as usize;
            if start == 0 && stop == PAGE as usize {
                self.pages.remove(&index);
            } else if let Some(page) = self.pages.get_mut(&index) {
                Arc::make_mut(page)[start..stop].fill(0);
            }
        }
    }

    pub(crate) fn set_len(&mut self, length: u64) {
        if length < self.length {
            // What a later extension uncovers must read as zeroes.
            self.zero(length, self.length - length);
        }
        self.length = length;
    }

    pub(crate) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let (first, _) = self.pages.range(offset / PAGE..).find(|(index, _)| **index * PAGE < self.length)?;
        let mut last = *first;
        while self.pages.contains_key(&(last + 1)) {
            last += 1;
        }
        let start = (first * PAGE).max(offset);
        let end = ((last + 1) * PAGE).min(self.length);
        (start < end).then_some((start, end))
    }
}
