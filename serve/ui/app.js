/** The page: makes its parts, and tells each what happens in the others. */

import { AccessKey } from "./access_key.js";
import { Announcer } from "./announcer.js";
import { Api } from "./api.js";
import { DetailsView } from "./details_view.js";
import { Drafts } from "./drafts.js";
import { find, setText } from "./element.js";
import { Entry } from "./entry.js";
import { Estimates } from "./estimates.js";
import { FilmStrip } from "./film_strip.js";
import { JobBook } from "./job_book.js";
import { JobFollower } from "./job_follower.js";
import { KeyDialog } from "./key_dialog.js";
import { Originals } from "./originals.js";
import { newId } from "./picture_file.js";
import { PictureSource } from "./picture_source.js";
import { Pictures } from "./pictures.js";
import { Problem, Unreachable } from "./problem.js";
import { ServiceStatus } from "./service_status.js";
import { SettingsForm } from "./settings_form.js";
import { Stage } from "./stage.js";
import { UploadQueue } from "./upload_queue.js";
import { stateText } from "./words.js";

const ADDRESS = /^#picture=([0-9a-f-]+)$/;

class App {
  constructor() {
    this._key = new AccessKey();
    this._api = new Api(this._key);
    this._originals = new Originals();
    this._book = new JobBook(this._api, this._originals);
    this._uploads = new UploadQueue(this._api, this._book, this._originals);
    this._follower = new JobFollower(this._api, this._book);
    this._pictures = new Pictures(this._api);
    this._announcer = new Announcer();
    this._settings = new SettingsForm(/** @type {any} */ (find("#settings")));
    this._drafts = new Drafts(new Estimates(this._api), this._settings, (text) => this._announcer.say(text));
    this._details = new DetailsView(find("#details"), (entry) => this._again(entry));
    this._strip = new FilmStrip(this._book, { onSelect: (entry) => this._open(entry), onMore: () => this._read(() => this._book.loadMore()) });
    this._stage = new Stage(this._pictures, {
      onCancel: (entry) => this._cancel(entry),
      onAgain: (entry) => this._again(entry),
      onLoaded: (entry) => entry === this._selected && this._show(),
      onNew: () => this._openNew(),
    });
    this._dialog = new KeyDialog(this._api, this._key, () => this._keyChanged());
    this._status = new ServiceStatus(this._api, () => this._back(), (can) => this._settings.offerDescriptions(can));
    this._source = new PictureSource((files) => this._chosen(files), (names) => this._refusedFiles(names));
    /** @type {Entry | null} */
    this._selected = null;
    this._listen();
  }

  /** @returns {Promise<void>} */
  async start() {
    this._status.look();
    const unsent = await this._book.open();
    await this._read(() => this._book.load());
    for (const entry of unsent) this._uploads.add(entry);
    await this._route();
  }

  _listen() {
    this._book.addEventListener("change", (event) => this._changed(/** @type {CustomEvent} */ (event).detail));
    this._api.addEventListener("unauthorized", (event) => this._needsKey(/** @type {CustomEvent} */ (event).detail));
    this._settings.addEventListener("start", () => this._send());
    addEventListener("hashchange", () => this._route());
    for (const choose of ["#choose", "#drafts-view .add"]) find(choose).addEventListener("click", () => this._source.choose());
    find("#new-picture").addEventListener("click", () => this._openNew());
  }

  /** The address says which picture is shown, so that a reload and the back button do what one expects. */
  async _route() {
    const id = ADDRESS.exec(location.hash)?.[1];
    let entry = id ? this._book.find(id) : undefined;
    if (id && !entry) await this._read(async () => { entry = await this._book.fetch(id); });
    const isOther = (entry ?? null) !== this._selected;
    this._selected = entry ?? null;
    this._show();
    if (isOther) scrollTo({ top: 0 });
  }

  /** @param {Entry} entry */
  _open(entry) {
    location.hash = `picture=${entry.address}`;
  }

  _openNew() {
    location.hash = "new";
  }

  /** @param {Entry | null} entry */
  _changed(entry) {
    if (entry) this._announcer.follow(entry, entry === this._selected);
    if (this._selected && !this._book.entries.includes(this._selected)) this._replaced(this._selected);
    else if (entry === this._selected) this._show();
  }

  /** @param {Entry} entry that is gone: what stands for the same job now is shown instead */
  _replaced(entry) {
    const other = this._book.find(entry.address);
    if (!other) return this._openNew();
    this._selected = other;
    return this._show();
  }

  _show() {
    const entry = this._selected;
    if (entry && ADDRESS.test(location.hash)) history.replaceState(null, "", `#picture=${entry.address}`);
    this._stage.show(entry);
    find("#settings").hidden = entry !== null;
    find("#details").hidden = entry === null;
    find("#new-picture").hidden = entry === null;
    if (entry) this._details.show(entry, this._pictures.result(entry));
    this._strip.select(entry);
    this._follower.watch(entry);
    document.title = entry ? `${stateText(entry)} \u00b7 ${entry.title} \u00b7 FaithDiff` : "FaithDiff";
  }

  /** @param {File[]} files */
  _chosen(files) {
    if (this._selected) this._openNew();
    this._refusedFiles([]);
    return this._drafts.add(files);
  }

  /** @param {string[]} names */
  _refusedFiles(names) {
    const text = names.length ? `Not a JPEG, PNG, WebP or TIFF: ${names.join(", ")}` : "";
    setText(find(".refused-files"), text);
  }

  async _send() {
    const settings = this._settings.values;
    const entries = this._drafts.take().map(({ file, thumbnail }) => new Entry(newId(), { name: file.name, original: file, thumbnail, settings }));
    if (!entries.length) return;
    entries.forEach((entry) => this._book.add(entry));
    this._open(entries[0]);
    find("#stage").focus({ preventScroll: true });
    for (const entry of entries) {
      // Kept before it is sent: a page that is closed in between goes on with the same key, and makes no second job.
      const { id, name, thumbnail } = entry;
      await this._originals.add({ id, name, blob: /** @type {Blob} */ (entry.original), thumbnail, settings });
      this._uploads.add(entry);
    }
  }

  /** @param {Entry} entry */
  async _cancel(entry) {
    if (!entry.job) return this._uploads.drop(entry);
    const jobId = entry.job.id;
    return this._read(async () => this._book.update(jobId, await this._api.cancel(jobId)));
  }

  /** @param {Entry} entry */
  async _again(entry) {
    if (!entry.original) return;
    this._settings.values = entry.settings;
    this._openNew();
    await this._drafts.add([new File([entry.original], entry.name, { type: entry.original.type })]);
    if (entry.state !== "refused") return;
    this._settings.showProblems(entry.upload.problem.fields);
    await this._uploads.drop(entry);
  }

  /** @param {Problem} problem */
  _needsKey(problem) {
    this._strip.tell("Enter your key to see your pictures.");
    this._dialog.open(this._key.value ? problem.text : "");
  }

  async _keyChanged() {
    this._book.forget();
    this._openNew();
    this._uploads.tryNow();
    this._drafts.ask();
    await this._read(() => this._book.load());
  }

  async _back() {
    this._uploads.tryNow();
    this._drafts.ask();
    await this._read(() => this._book.load());
    this._show();
  }

  /** @param {() => Promise<unknown>} ask what the person sees that it did not work, and can do again */
  async _read(ask) {
    try {
      await ask();
    } catch (error) {
      if (!(error instanceof Problem) && !(error instanceof Unreachable)) throw error;
      // A missing key has its dialog, a missing service its banner.
      if (error instanceof Problem && error.status !== 401) {
        this._strip.tell(error.text);
        this._announcer.say(error.text);
      }
    }
  }
}

await new App().start();
