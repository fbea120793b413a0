/** The trained network, as the page sees it. It runs in `worker.js`, so that the page never waits for it. */

export class Engine {
  #worker;
  #calls = new Map(); // by id: what to do with the worker's answers
  #nextId = 0;

  /** Load the runtime and the model; rejects with an Error whose message is a sentence for people. */
  static async load(modelUrl) {
    if (typeof WebAssembly === "undefined") {
      throw new Error("This browser has no WebAssembly, which the network runs in: please use a newer browser.");
    }
    const engine = new Engine();
    const loaded = await engine.#call("load", { modelUrl: new URL(modelUrl, document.baseURI).href });
    engine.metadata = loaded.metadata; // { name, resolution, channels, classes, sigma_min, sigma_max }
    engine.milliseconds = loaded.milliseconds; // of loading
    return engine;
  }

  /**
   * Sample an image for each label; returns { x, evaluations, milliseconds }, with the evaluations of each image.
   *
   * @param request { settings, guidance, labels, seed, start }: settings as in `sampler.js`; labels are classes, or
   *   null for none; start { x, sigma }, one noisy image or one for each label, begins there instead of at pure noise
   * @param options { onState, signal }: onState({ step, sigma, x, denoised }) is called after each step
   */
  sample(request, options) {
    return this.#call("sample", request, options);
  }

  /** Evaluate D once: { x, sigma, labels, guidance } with one image for each label. Returns D as a Float64Array. */
  async denoise(request, options) {
    return (await this.#call("denoise", request, options)).x;
  }

  constructor() {
    this.#worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const error = new Error("The worker that runs the network does not start: please use a newer browser.");
      for (const call of this.#calls.values()) call.finish(() => call.reject(error));
    };
  }

  /** Send a request to the worker; rejects with an AbortError once the signal is aborted. */
  #call(action, request, { onState, signal } = {}) {
    return new Promise((resolve, reject) => {
      signal?.throwIfAborted();
      const id = this.#nextId++;
      const abort = () => {
        this.#worker.postMessage({ id, action: "cancel" });
        finish(() => reject(signal.reason));
      };
      const finish = (settle) => {
        this.#calls.delete(id);
        signal?.removeEventListener("abort", abort);
        settle();
      };
      signal?.addEventListener("abort", abort);
      this.#calls.set(id, { onState, resolve, reject, finish });
      this.#worker.postMessage({ id, action, request });
    });
  }

  /** Pass a message of the worker on, unless its request was aborted. */
  #receive({ id, state, result, error }) {
    const call = this.#calls.get(id);
    if (!call) return;
    if (state) call.onState?.(state);
    else call.finish(() => (error === undefined ? call.resolve(result) : call.reject(new Error(error))));
  }
}
