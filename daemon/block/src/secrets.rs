//! Secrets that nodes may name, and the keys that have come of them: trying a passphrase takes seconds, by intention, and guests would
//! wait for that whenever an image is opened once more.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use vdisk_api::{Error, Result, Secret};
use vdisk_luks::{Fingerprint, Key};
use zeroize::Zeroizing;

/// Keys of one secret, at most. With more of them all are found out anew.
const MOST_KEYS: usize = 4096;

/// In a file each has its fingerprint, its length, and room for the longest.
const RECORD: usize = size_of::<Fingerprint>() + 1 + 64;

/// All secrets. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Arc<Mutex<BTreeMap<String, Entry>>>);

#[derive(Debug)]
struct Entry {
    secret: Arc<Secret>,
    keys: HashMap<Fingerprint, Arc<Key>>,
    /// Where they are written down for another process.
    file: Option<File>,
}

fn record(fingerprint: &Fingerprint, key: &Key) -> Zeroizing<[u8; RECORD]> {
    let mut out = Zeroizing::new([0; RECORD]);
    let (print, rest) = out.split_at_mut(fingerprint.len());
    print.copy_from_slice(fingerprint);
    rest[0] = key.bytes().len() as u8;
    rest[1..=key.bytes().len()].copy_from_slice(key.bytes());
    out
}

/// What [`record`] has written; None of what it has not.
fn read_record(bytes: &[u8]) -> Option<(Fingerprint, Key)> {
    let (print, rest) = bytes.split_first_chunk()?;
    let (len, key) = rest.split_first()?;
    Some((*print, Key::new(key.get(..usize::from(*len))?)?))
}

impl Entry {
    fn write(&self, fingerprint: &Fingerprint, key: &Key) -> io::Result<()> {
        match &self.file {
            // Records that are cut off have no successors: their places are written to again.
            Some(file) => file.write_all_at(
                &*record(fingerprint, key),
                (self.keys.len() * RECORD) as u64,
            ),
            None => Ok(()),
        }
    }

    fn wipe(&mut self) -> io::Result<()> {
        let len = self.keys.len() * RECORD;
        self.keys.clear();
        match &self.file {
            Some(file) => file
                .write_all_at(&vec![0; len], 0)
                .and_then(|()| file.set_len(0)),
            None => Ok(()),
        }
    }
}

impl Secrets {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn add(&self, id: &str, secret: Secret) -> Result<()> {
        let mut all = self.all();
        if all.contains_key(id) {
            return Err(Error::exists(format!(
                "there is a secret '{id}' already: choose another id, or remove it first"
            )));
        }
        let entry = Entry {
            secret: Arc::new(secret),
            keys: HashMap::new(),
            file: None,
        };
        all.insert(id.to_owned(), entry);
        Ok(())
    }

    /// Forgets a secret with its keys, in its file as well.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.get(id)?;
        if let Some(mut entry) = self.all().remove(id)
            && let Err(error) = entry.wipe()
        {
            tracing::warn!(secret = id, %error, "its keys cannot be wiped");
        }
        Ok(())
    }

    pub fn get(&self, id: &str) -> Result<Arc<Secret>> {
        let all = self.all();
        let entry = all.get(id).map(|e| e.secret.clone());
        entry.ok_or_else(|| {
            Error::not_found(format!(
                "there is no secret '{id}': add it with 'vdiskctl secret add', or see the list of secrets"
            ))
        })
    }

    pub fn ids(&self) -> Vec<String> {
        self.all().keys().cloned().collect()
    }

    /// The key that a secret has opened something with before.
    pub fn key(&self, id: &str, fingerprint: &Fingerprint) -> Option<Arc<Key>> {
        self.all().get(id)?.keys.get(fingerprint).cloned()
    }

    /// Notes what a secret opens, if it is still there: in the meantime it may have been removed, and another have its name.
    pub fn remember(&self, id: &str, secret: &Arc<Secret>, fingerprint: Fingerprint, key: Key) {
        let mut all = self.all();
        let Some(entry) = all.get_mut(id) else {
            return;
        };
        if !Arc::ptr_eq(&entry.secret, secret) || entry.keys.contains_key(&fingerprint) {
            return;
        }
        let written = match entry.keys.len() >= MOST_KEYS {
            true => entry.wipe(),
            false => Ok(()),
        };
        if let Err(error) = written.and_then(|()| entry.write(&fingerprint, &key)) {
            tracing::warn!(secret = id, %error, "a key is not kept for a restart");
            return;
        }
        entry.keys.insert(fingerprint, Arc::new(key));
    }

    /// Whether keys of a secret are written down.
    pub fn keeps_keys(&self, id: &str) -> bool {
        self.all().get(id).is_some_and(|e| e.file.is_some())
    }

    /// Takes up the keys of a secret that another process has left in `file`, and writes there from now on; those that are known by now
    /// first.
    ///
    /// # Errors
    /// If it cannot be read or written. Nothing more is written there then.
    pub fn keep_keys(&self, id: &str, file: File) -> io::Result<()> {
        let len = file.metadata()?.len().min((MOST_KEYS * RECORD) as u64);
        let mut bytes = Zeroizing::new(vec![0; len as usize]);
        file.read_exact_at(&mut bytes, 0)?;
        let mut all = self.all();
        if let Some(entry) = all.get_mut(id) {
            let mut found = HashMap::new();
            let records = bytes.chunks_exact(RECORD);
            for (fingerprint, key) in records.map_while(read_record) {
                found.insert(fingerprint, Arc::new(key));
            }
            let known = std::mem::replace(&mut entry.keys, found);
            entry.file = Some(file);
            for (fingerprint, key) in known {
                if entry.keys.contains_key(&fingerprint) {
                    continue;
                }
                if let Err(e) = entry.write(&fingerprint, &key) {
                    entry.file = None;
                    return Err(e);
                }
                entry.keys.insert(fingerprint, key);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        let fd = rustix::fs::memfd_create("keys", rustix::fs::MemfdFlags::CLOEXEC);
        File::from(fd.unwrap())
    }

    fn with_secret() -> Secrets {
        let secrets = Secrets::default();
        secrets.add("s", Secret::new(b"open".to_vec())).unwrap();
        secrets
    }

    #[test]
    fn keys_are_known_to_the_next_process() {
        let kept = file();
        let one = with_secret();
        let secret = |of: &Secrets| of.get("s").unwrap();
        one.remember("s", &secret(&one), [1; 32], Key::new(&[7; 64]).unwrap());
        one.keep_keys("s", kept.try_clone().unwrap()).unwrap();
        one.remember("s", &secret(&one), [2; 32], Key::new(&[8; 32]).unwrap());
        one.remember("other", &secret(&one), [3; 32], Key::new(&[9; 32]).unwrap());
        // It was killed while it wrote another.
        kept.write_all_at(&[3; 40], 2 * RECORD as u64).unwrap();
        let two = with_secret();
        assert!(two.key("s", &[1; 32]).is_none());
        two.keep_keys("s", kept.try_clone().unwrap()).unwrap();
        let bytes = |of: &Secrets, n| of.key("s", &[n; 32]).map(|k| k.bytes().to_vec());
        assert_eq!(bytes(&two, 1), Some(vec![7; 64]));
        assert_eq!(bytes(&two, 2), Some(vec![8; 32]));
        assert_eq!(bytes(&two, 3), None);
        two.remember("s", &secret(&two), [4; 32], Key::new(&[6; 32]).unwrap());
        // What another secret of that name has opened is not this one's.
        two.remember("s", &secret(&one), [5; 32], Key::new(&[5; 32]).unwrap());
        assert_eq!(bytes(&two, 5), None);
        let three = with_secret();
        three.keep_keys("s", kept.try_clone().unwrap()).unwrap();
        assert_eq!(bytes(&three, 4), Some(vec![6; 32]));
        // They go with their secret.
        three.remove("s").unwrap();
        assert_eq!(kept.metadata().unwrap().len(), 0);
    }

    #[test]
    fn keys_are_bounded() {
        let kept = file();
        let secrets = with_secret();
        secrets.keep_keys("s", kept.try_clone().unwrap()).unwrap();
        for n in 0..MOST_KEYS + 3 {
            let mut print = [0; 32];
            print[..8].copy_from_slice(&n.to_le_bytes());
            secrets.remember(
                "s",
                &secrets.get("s").unwrap(),
                print,
                Key::new(&[7; 64]).unwrap(),
            );
        }
        assert_eq!(kept.metadata().unwrap().len(), 3 * RECORD as u64);
    }

    #[test]
    fn what_is_damaged_is_not_taken() {
        let kept = file();
        kept.write_all_at(&[200; 3 * RECORD], 0).unwrap();
        let secrets = with_secret();
        secrets.keep_keys("s", kept).unwrap();
        assert!(secrets.key("s", &[200; 32]).is_none());
    }
}
