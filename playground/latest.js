// Long computations: a new setting ends the old computation, and only one runs at a time, in all tabs together.

let running = Promise.resolve();

/**
 * Return { start(), cancel() } of a computation `work(signal)`, which starts `delay` ms after the last call of start().
 * Both cancel the running computation: its AbortSignal fires, and what it throws after that is dropped.
 */
export function latest(work, delay = 100) {
  let controller = new AbortController();

  function cancel() {
    controller.abort();
    controller = new AbortController();
    return controller.signal;
  }

  function start() {
    const signal = cancel();
    setTimeout(() => {
      if (signal.aborted) return;
      running = running.then(async () => {
        if (signal.aborted) return;
        try {
          await work(signal);
        } catch (error) {
          if (!signal.aborted) throw error;
        }
      }).catch((error) => console.error(error));
    }, delay);
  }

  return { start, cancel };
}
